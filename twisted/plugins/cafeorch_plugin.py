"""Makes ``twistd cafeorch`` and ``twist cafeorch`` known."""

from twisted.application.service import ServiceMaker

cafeorch = ServiceMaker(
    "cafeteria_orch",
    "cafeteria_orch.tap",
    "Takes tables from coffee-shop agencies over TCP, batch by batch, into a store.",
    "cafeorch",
)
