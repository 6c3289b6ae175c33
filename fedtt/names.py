"""Texts from outside that name something, held to their form wherever they are decoded."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

__all__ = ["WHOLE", "DeviceId", "LeaseId", "Name", "Sha256", "SignatureHex", "Slug"]

WHOLE = "$(?!\n)"  #: the end of a text: `$` alone would let one line feed through after it

SignatureHex = Annotated[str, Meta(pattern=f"^[0-9a-f]{{128}}{WHOLE}")]  #: of Ed25519, 64 bytes
Sha256 = Annotated[str, Meta(pattern=f"^[0-9a-f]{{64}}{WHOLE}")]
DeviceId = Annotated[str, Meta(pattern=f"^[0-9a-f]{{32}}{WHOLE}")]
LeaseId = Annotated[str, Meta(pattern=f"^[0-9a-f]{{32}}{WHOLE}")]
Name = Annotated[str, Meta(max_length=100, pattern="^[^\0]*$")]  #: PostgreSQL holds no text with a NUL
Slug = Annotated[str, Meta(pattern=f"^[a-z0-9][a-z0-9-]{{0,62}}{WHOLE}")]  #: of a task
