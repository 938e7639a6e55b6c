"""The configuration page says what the program does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from arka.settings import SETTINGS, load_settings

DOCS = Path(__file__).parents[2] / "docs"


def test_page_is_what_the_generator_writes():
    """docs/configuration.md was generated from the options as they are now."""
    spec = importlib.util.spec_from_file_location("generate_configuration", DOCS / "generate_configuration.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == generator.make_page()


def test_example_in_the_page_loads(tmp_path):
    """The page's TOML example is legal."""
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    config = tmp_path / "arka.toml"
    config.write_text(example)
    settings = load_settings(config=config, environment={}).settings
    assert settings.iceberg.catalog == {"type": "rest", "s3.region": "eu-central-1"}
    assert settings.object_store.config == {"aws_region": "eu-central-1"}


def test_variables_in_the_page_exist():
    """Every variable that the page names means what it says."""
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    variables = set(re.findall(r"ARKA_[A-Z0-9_]*[A-Z0-9]", page)) - {
        "ARKA_DEBUG",
        "ARKA_FAILPOINTS",
        "ARKA_TESTING",
        "ARKA_EXT",
        "ARKA_TABLE_NAME",
    }
    assert variables
    loaded = load_settings(environment=dict.fromkeys(variables, "7"))
    assert loaded.origins["iceberg.catalog.s3.secret-access-key"] in variables
    assert loaded.origins["object_store.config.aws_secret_access_key"] in variables
    assert {loaded.origins[key] for key in SETTINGS} & variables == {"ARKA_SERVER_DRAIN_S"}
