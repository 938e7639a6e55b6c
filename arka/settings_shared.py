"""Settings of one store that two libraries read, each under names of its own.

Owns: how pyiceberg's ``s3.*`` properties follow from obstore's settings. Imports nothing but the language.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: pyiceberg's name, and obstore's names for the same: the first of them that is there counts.
_S3_NAMES: Final = (
    ("s3.access-key-id", ("aws_access_key_id", "access_key_id")),
    ("s3.secret-access-key", ("aws_secret_access_key", "secret_access_key")),
    ("s3.session-token", ("aws_session_token", "aws_token", "session_token", "token")),
    ("s3.region", ("aws_region", "region", "aws_default_region", "default_region")),
    ("s3.endpoint", ("aws_endpoint_url_s3", "aws_endpoint_url", "aws_endpoint", "endpoint_url", "endpoint")),
    ("s3.force-virtual-addressing", ("aws_virtual_hosted_style_request", "virtual_hosted_style_request")),
)
_S3: Final = ("s3://", "s3a://")


def shared_s3_properties(
    store_url: str, store: Mapping[str, str], warehouse: str, catalog: Mapping[str, str]
) -> dict[str, str]:
    """Return the ``s3.*`` properties that a warehouse takes over from the object store.

    Args:
        store_url: of the object store.
        store: its settings, as obstore names them.
        warehouse: URL of the warehouse.
        catalog: the catalog's properties.

    Returns:
        Empty unless both lie in S3 and ``catalog`` has no ``s3.*`` of its own: with one given, they are two
        different stores, and credentials of one are none of the other's business.
    """
    if not (store_url.startswith(_S3) and warehouse.startswith(_S3)) or any(key.startswith("s3.") for key in catalog):
        return {}
    given = {key.lower(): value for key, value in store.items()}
    found = {}
    for name, spellings in _S3_NAMES:
        value = next((given[spelling] for spelling in spellings if spelling in given), None)
        if value is not None:
            found[name] = value
    return found


def store_settings(warehouse: str, catalog: Mapping[str, str]) -> dict[str, str]:
    """Return obstore's settings for a warehouse in S3: what pyiceberg's ``s3.*`` properties say, in its names.

    Args:
        warehouse: its URL.
        catalog: the catalog's properties.

    Returns:
        Empty for a warehouse that is not in S3: the environment says how it is reached.
    """
    if not warehouse.startswith(_S3):
        return {}
    return {spellings[0]: catalog[name] for name, spellings in _S3_NAMES if name in catalog}


__all__ = ["shared_s3_properties", "store_settings"]
