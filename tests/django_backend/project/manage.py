"""Run by ../test_project.py; ENGINE, DRIVER, TAG and START_METHOD are in the environment."""

import os
import sys

import puff_patch

puff_patch.patch_all()
if os.environ["DRIVER"] == "psycopg2":
    sys.modules["psycopg"] = None  # Django prefers it, if it can be imported

import multiprocessing  # noqa: E402

from django.core.management import execute_from_command_line  # noqa: E402

if __name__ == "__main__":
    multiprocessing.set_start_method(os.environ["START_METHOD"])
    os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
    execute_from_command_line(sys.argv)
