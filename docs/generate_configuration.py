"""Write docs/configuration.md from ``arka.options``; a test holds the page to it.

python docs/generate_configuration.py
"""

from __future__ import annotations

from pathlib import Path

from arka.settings import SETTINGS, Setting
from arka.settings_text import format_size, format_value

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by docs/generate_configuration.py from arka/options.py. Edit those. -->

A setting has one name, `table.name`, and four places. A later one wins:

1. the default below;
2. the TOML file of `--config`: `name` in the table `[table]`;
3. the environment: `ARKA_TABLE_NAME`, so `server.drain_s` is `ARKA_SERVER_DRAIN_S`;
4. the command line, for the settings that have a flag (`arka-server --help`).

`arka-server --show-config` prints every setting with its value and where it came from, secrets masked, and
starts nothing. What it prints is itself a legal TOML file. Names that Arka does not know are errors, in the
file as in the environment (`ARKA_DEBUG` and `ARKA_EXT` belong to the build and are ignored).
`ARKA_FAILPOINTS` makes a server kill itself or fail, for tests alone: a server that has it starts only with
`ARKA_TESTING=1` beside it.

Names end in their unit: `_s` is seconds, a number with or without a fraction; `bytes` takes a whole number
or a string with a binary unit: `65536`, `"64KiB"`, `"128MiB"`, `"1GiB"`. A relative `server.data_dir` is
relative to the directory that the server was started in.

```toml
[server]
data_dir = "/var/lib/arka"
drain_s = 20

[limits]
memory_bytes = "4GiB"

[object_store]
url = "s3://bucket/arka"

[object_store.config]            # handed to obstore as it is
aws_region = "eu-central-1"

[iceberg]
catalog_uri = "https://catalog.example.com"
warehouse = "s3://bucket/warehouse"

[iceberg.catalog]                # handed to pyiceberg as it is
type = "rest"
"s3.region" = "eu-central-1"
```

Credentials belong in the environment. In the two tables that are handed on, a variable's name continues after
two underscores: `ARKA_ICEBERG_CATALOG__S3__SECRET_ACCESS_KEY` is `s3.secret-access-key` (`__` is a dot, `_` a
dash), and `ARKA_OBJECT_STORE_CONFIG__AWS_SECRET_ACCESS_KEY` is `aws_secret_access_key`.

Where objects and warehouse both lie in S3, and `[iceberg.catalog]` has no `s3.` property, pyiceberg takes
credentials, region, endpoint and addressing from `[object_store.config]`. The AWS variables
(`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …) reach both libraries as they are.

On the embedded defaults objects, catalog and warehouse lie in the data directory: every ack from `disk` on
then survives a crash of the process, and none survives the loss of that disk.
"""


def describe_bounds(setting: Setting) -> str:
    """Say in words what values are legal."""
    if setting.one_of:
        return ", ".join(f"`{word}`" for word in setting.one_of)
    if setting.matches:
        return f"`{setting.matches}`"
    write = format_size if setting.is_size else "{:g}".format
    bounds = [
        f"{word} {write(int(bound) if setting.is_size else bound)}"
        for word, bound in (("≥", setting.at_least), ("≤", setting.at_most))
        if bound is not None
    ]
    return ", ".join(bounds)


def make_page() -> str:
    """Write the whole page."""
    lines = [HEAD]
    table = None
    for setting in SETTINGS.values():
        if setting.key.partition(".")[0] != table:
            table = setting.key.partition(".")[0]
            lines += [f"\n## [{table}]\n", "| name | default | legal | meaning |", "|---|---|---|---|"]
        name = setting.key.partition(".")[2]
        if setting.kind is dict:
            lines.append(f"| `[{setting.key}]` | empty | strings | {setting.help} |")
        else:
            default = format_value(setting.default, is_size=setting.is_size)
            lines.append(f"| `{name}` | `{default}` | {describe_bounds(setting)} | {setting.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
