"""The contract of stores of their own, over a folder, in memory and on S3."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.storage.root import Root, open_root
from holdfast.testing.stores import CheckpointStoreContract, Opens
from tests.s3_server import S3

_numbers = itertools.count()


class TestLocal(CheckpointStoreContract):
    @pytest.fixture(params=["plain", "ex [a-z] * ? ü {date} %s"])
    def opens(self, tmp_path: Path, request: pytest.FixtureRequest) -> Opens:
        return lambda **config: holdfast.CheckpointStore(tmp_path / "runs" / request.param, config)


class TestMemory(CheckpointStoreContract):
    @pytest.fixture
    def opens(self) -> Opens:
        place = f"memory://checkpoints/{next(_numbers)}"
        return lambda **config: holdfast.CheckpointStore(place, config)


class TestS3(CheckpointStoreContract):
    @pytest.fixture
    def opens(self, s3: S3, tmp_path: Path) -> Opens:
        place = f"{s3.bucket()}/a prefix ü"
        self.options: dict[str, Any] = s3.options
        return lambda **config: holdfast.CheckpointStore(place, config, storage_options=s3.options)

    def root(self, store: holdfast.CheckpointStore) -> Root:
        return open_root(str(store.path), self.options)
