import uuid
from pathlib import Path

import msgspec
import pytest

from agent.config import AgentConfig, node_id, prepare_data_dir
from mesh.errors import ConfigError


def new_uuid() -> str:
    return str(uuid.uuid4())


def test_node_id_is_made_once_and_kept(tmp_path: Path) -> None:
    config = AgentConfig(node_name="n", data_dir=str(tmp_path))
    first = node_id(config, new_uuid)
    assert node_id(config, new_uuid) == first
    assert (tmp_path / "node-id").read_text().strip() == first


def test_a_configured_node_id_wins_and_dev_keeps_none(tmp_path: Path) -> None:
    config = AgentConfig(node_name="n", data_dir=str(tmp_path), node_id="ADF4238A-882B-9DDC-4A9D-5B6758E4159E")
    assert node_id(config, new_uuid) == "adf4238a-882b-9ddc-4a9d-5b6758e4159e"
    dev = msgspec.structs.replace(config, data_dir="", node_id="")
    assert node_id(dev, new_uuid) != node_id(dev, new_uuid)


def test_a_damaged_node_id_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "node-id").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"node-id: holds no UUID"):
        node_id(AgentConfig(node_name="n", data_dir=str(tmp_path)), new_uuid)


def test_the_data_dir_is_made_private_or_named(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    prepare_data_dir(AgentConfig(node_name="n", data_dir=str(target)))
    assert target.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data_dir .*file: cannot create it"):
        prepare_data_dir(AgentConfig(node_name="n", data_dir=str(tmp_path / "file")))
