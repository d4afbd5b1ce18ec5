"""A small Django project for the tests of runpuff; environment variables change its settings."""

import os
import sys

if "PROJECT_UNPATCHED" not in os.environ:
    import puff_patch

    puff_patch.patch_all()

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project_settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
