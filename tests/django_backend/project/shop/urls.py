from django.urls import path

from shop import views

urlpatterns = [
    path("buy/<str:name>/", views.buy),
    path("break/<str:name>/", views.break_down),
    path("half/<str:name>/", views.half),
]
