"""The URLs of the polls."""

from django.urls import path

from polls import views

app_name = "polls"

urlpatterns = [
    path("", views.index, name="index"),
    path("topics/<slug:topic>/", views.index, name="topic"),
    path("polls/<int:pk>/", views.detail, name="detail"),
    path("polls/<int:pk>/results/", views.results, name="results"),
    path("polls/<int:pk>/results.json", views.live_results, name="live"),
]
