from django.core.cache import cache
from django.db import transaction
from django.db.models import F
from django.http import HttpResponse

from shop.models import Item, Receipt


def buy(request, name):
    """Takes one from stock, and writes the receipt once that is committed."""
    item = Item.objects.select_for_update().get(name=name)
    Item.objects.filter(pk=item.pk).update(stock=F("stock") - 1)
    transaction.on_commit(lambda: Receipt.objects.create(item=name))
    return HttpResponse(str(item.stock - 1))


def break_down(request, name):
    Item.objects.filter(name=name).update(stock=-1)
    transaction.on_commit(lambda: cache.set("broken", name))
    raise LookupError("on purpose")


def half(request, name):
    """The inner block is undone, the rest of the request stands."""
    Item.objects.create(name=f"{name}-outer")
    try:
        with transaction.atomic():
            Item.objects.create(name=f"{name}-inner")
            transaction.on_commit(lambda: cache.set("inner", name))
            raise LookupError
    except LookupError:
        pass
    transaction.on_commit(lambda: cache.set("outer", name))
    return HttpResponse("half")
