"""Receipts live in the archive, all else in the default database."""


def database_of(model):
    return "archive" if model._meta.model_name == "receipt" else "default"


class Router:
    def db_for_read(self, model, **hints):
        return database_of(model)

    def db_for_write(self, model, **hints):
        return database_of(model)

    def allow_migrate(self, db, app_label, model_name=None, **hints):
        return model_name is None or db == ("archive" if model_name == "receipt" else "default")
