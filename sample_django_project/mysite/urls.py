"""The URLs of the project."""

from django.conf import settings
from django.contrib import admin
from django.templatetags.static import static
from django.urls import include, path
from django.views.generic import RedirectView

admin.site.site_header = "Show of Hands"
admin.site.site_title = "Show of Hands"
admin.site.index_title = "Behind the polls"

urlpatterns = [
    path("admin/", admin.site.urls),
    path("favicon.ico", RedirectView.as_view(url=static("img/favicon.svg"))),
    path("", include("polls.urls")),
]

if settings.SAMPLE_BENCH:
    urlpatterns += [path("", include("bench.urls"))]
