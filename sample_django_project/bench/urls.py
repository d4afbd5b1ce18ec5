"""URLs to measure and to play with; only there when ``settings.SAMPLE_BENCH`` is on."""

from django.urls import path

from bench import views

app_name = "bench"

urlpatterns = [
    path("hello/", views.hello, name="hello"),
    path("bench/orm/", views.orm, name="orm"),
    path("bench/cache/", views.cached, name="cache"),
    path("bench/mixed/", views.mixed, name="mixed"),
    path("bench/sleep/", views.sleep, name="sleep"),
    path("bench/stream/", views.stream, name="stream"),
    path("bench/upload/", views.upload, name="upload"),
    # As `curl -T FILE http://.../bench/upload/` has it.
    path("bench/upload/<str:name>", views.upload, name="upload-named"),
]
