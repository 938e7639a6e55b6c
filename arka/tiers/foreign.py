"""What others did to a table, and what of it takes effect here (R24, R27).

Owns: the comparison of a table as it is known with the one that the catalog has, and which columns a write has lost
since it was accepted. Does not own when the catalog is asked (``arka.tiers.adoption``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple
from uuid import UUID

import pyarrow as pa

from arka.errors import ArkaError
from arka.records import FIELD_ID_KEY, TableInfo, TableType
from arka.tableproperties import CLEANED, MARK, OWN_RULES, OWNER, PRIMARY_KEY, TABLE_TYPE

_PREFIX: Final = "arka."
_SERVERS_OWN: Final = frozenset({TABLE_TYPE, PRIMARY_KEY, OWNER, CLEANED})


class Judgement(NamedTuple):
    """What a loaded table means here.

    Attributes:
        info: the table to go on with.
        refusal: why it takes no new writes; empty if it does.
        remarks: what others set that has no effect.
    """

    info: TableInfo
    refusal: str
    remarks: tuple[str, ...]


def judge(known: TableInfo, found: TableInfo, log_uuid: UUID) -> Judgement:
    """Compare a table with what the catalog has.

    Args:
        known: the table as it is known here.
        found: the same table, as it was just loaded.
        log_uuid: the log that writes to it.
    """
    remarks: list[str] = []
    kept = found
    if found.table_type is not known.table_type:
        said = found.properties.get(TABLE_TYPE)
        remarks.append(
            f"property {TABLE_TYPE!r} is {'gone' if said is None else repr(said)}: the table stays "
            f"{known.table_type.value!r}"
        )
        kept = replace(kept, table_type=known.table_type)
    if known.table_type is not TableType.PRIMARY_KEY:
        kept = replace(kept, key_columns=())
    elif _key_ids(found) != _key_ids(known):
        why = (
            f"Others changed the primary key of {known.name} from {list(known.key_columns)} to "
            f"{list(found.key_columns)}: change it back"
        )
        return Judgement(known, why, tuple(remarks))
    said = found.properties.get(PRIMARY_KEY, "")
    named = [column for column in found.schema.names if json.dumps(column) in said and column not in kept.key_columns]
    if named and known.table_type is TableType.PRIMARY_KEY:
        # The schema's identifier fields decide: the property does not follow renames.
        remarks.append(f"property {PRIMARY_KEY!r} is {said!r}: the key stays {list(kept.key_columns)}")
    properties = dict(found.properties)
    for name in sorted(properties):
        problem = _problem(name, properties[name], keyed=known.table_type is TableType.PRIMARY_KEY)
        if problem:
            remarks.append(problem)
            properties.pop(name)
            if name in OWN_RULES and name in known.properties:
                properties[name] = known.properties[name]
    kept = replace(kept, properties=properties)
    try:
        kept.check_owner(log_uuid)
    except ArkaError as error:
        return Judgement(kept, error.detail, tuple(remarks))
    return Judgement(kept, "", tuple(remarks))


def _problem(name: str, value: str, *, keyed: bool) -> str:
    """Say why a property of a table has no effect; empty if it has one, or is none of Arka's."""
    if not name.startswith(_PREFIX) or name in _SERVERS_OWN or MARK.match(name):
        return ""
    rule = OWN_RULES.get(name)
    if rule is None:
        return f"property {name!r} is not known to this server and has no effect: unset it"
    if not keyed:
        return f"property {name!r} has no effect: it is for primary_key tables only"
    if not rule.pattern.match(value):
        return f"property {name!r} is {value!r}, expected {rule.expected}: it has no effect"
    return ""


def _key_ids(info: TableInfo) -> set[bytes]:
    columns = {column.name: column.metadata[FIELD_ID_KEY] for column in info.schema}
    return {columns.get(name, b"") for name in info.key_columns}


def dropped_columns(accepted: pa.Schema, now: pa.Schema) -> tuple[str, ...]:
    """Name the columns that a write was accepted with and that its table no longer has, nested fields too (R24).

    Args:
        accepted: the schema of its frame.
        now: the table's; both carry field ids.
    """
    return tuple(_dropped(list(accepted), list(now), ""))


def _dropped(accepted: Sequence[pa.Field], now: Sequence[pa.Field], prefix: str) -> list[str]:
    kept = {field.metadata[FIELD_ID_KEY]: field for field in now}
    found = []
    for field in accepted:
        target = kept.get(field.metadata[FIELD_ID_KEY])
        if target is None:
            found.append(f"{prefix}{field.name}")
        else:
            found += _dropped(_below(field.type), _below(target.type), f"{prefix}{field.name}.")
    return found


def _below(kind: pa.DataType) -> list[pa.Field]:
    """The fields below a canonical type."""
    if pa.types.is_struct(kind):
        return list(kind)
    if pa.types.is_list(kind):
        return [kind.value_field]
    if pa.types.is_map(kind):
        return [kind.key_field, kind.item_field]
    return []


__all__ = ["Judgement", "dropped_columns", "judge"]
