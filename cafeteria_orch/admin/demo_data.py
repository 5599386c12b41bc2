"""Exports of made-up agencies, for ``cafeorch demo``."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from uuid import UUID

AGENCIES = {1: "Buenos Aires", 2: "Ipoh", 3: "Trieste"}
"""The city of each."""

_SALES = 200
_SHOPS = 3
_USERS = 40
_MONTH = datetime(2024, 1, 1)  # noqa: DTZ001 (agencies write times without a zone)
_MENU = (
    ("Espresso", 6.0),
    ("Americano", 7.0),
    ("Flat White", 9.0),
    ("Cappuccino", 9.0),
    ("Hot Chocolate", 9.5),
    ("Matcha Latte", 10.0),
)
_HEADERS = {
    "menu_items": "item_id item_name category price is_seasonal available_from available_to",
    "stores": "store_id store_name street postal_code city state latitude longitude",
    "users": "user_id gender birthdate registered_at",
    "transactions": "transaction_id store_id payment_method_id voucher_id user_id original_amount"
    " discount_applied final_amount created_at",
    "transaction_items": "transaction_id item_id quantity unit_price subtotal created_at",
}

_Row = Sequence[object]


def write_exports(folder: Path, agency_id: int) -> None:
    """Write a month of an agency's tables, one file each; the same at every call.

    :param folder: is made.
    :param agency_id: of :data:`AGENCIES`.
    """
    folder.mkdir()
    random = Random(agency_id)  # noqa: S311 (nobody is to be kept from guessing it)
    sales = [_sale(random) for _ in range(_SALES)]
    tables: dict[str, Iterable[_Row]] = {
        "menu_items": (
            (number, name, "coffee", price, False, "", "")
            for number, (name, price) in enumerate(_MENU, 1)
        ),
        "stores": (_shop(random, number, AGENCIES[agency_id]) for number in range(1, _SHOPS + 1)),
        "users": (_user(random, number) for number in range(1, _USERS + 1)),
        "transactions": (transaction for transaction, _ in sales),
        "transaction_items": (item for _, items in sales for item in items),
    }
    for table, rows in tables.items():
        with (folder / f"{table}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_HEADERS[table].split())
            writer.writerows(rows)


def _sale(random: Random) -> tuple[_Row, list[_Row]]:
    identifier = UUID(int=random.getrandbits(128), version=4)
    moment = _MONTH + timedelta(seconds=random.randrange(31 * 86_400))
    items: list[_Row] = []
    total = 0.0
    for number in random.sample(range(1, len(_MENU) + 1), random.randint(1, 3)):
        price, quantity = _MENU[number - 1][1], random.randint(1, 3)
        items.append((identifier, number, quantity, price, quantity * price, moment))
        total += quantity * price
    # A data frame writes a column with gaps so.
    user = f"{random.randint(1, _USERS)}.0" if random.random() < 0.5 else ""
    shop, method = random.randint(1, _SHOPS), random.randint(1, 5)
    return (identifier, shop, method, "", user, total, 0.0, f"{total:.2f}", moment), items


def _shop(random: Random, number: int, city: str) -> _Row:
    name = f"G Coffee @ {city} {number}"
    place = (f"{random.uniform(-60, 60):.6f}", f"{random.uniform(-180, 180):.6f}")
    return (number, name, f"Street {number}", f"{random.randrange(10**5):05}", city, city, *place)


def _user(random: Random, number: int) -> _Row:
    birthdate = _MONTH - timedelta(days=random.randint(18 * 366, 70 * 366))
    registered = _MONTH + timedelta(seconds=random.randrange(31 * 86_400))
    return (number, random.choice(["female", "male"]), birthdate.date(), registered)
