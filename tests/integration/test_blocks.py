"""Storages, databases and specs that are saved as blocks on a real server, with secrets that are nowhere else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from s3_server import S3
from support import DIED, Lab
from support_postgres import Postgres
from support_prefect import View

from holdfast.storage.objects import ObjectRoot

SECRETS = ("canary-of-the-bucket", "canary-of-the-database", "canary-of-the-options")

SAVE = """
import json, sys
from holdfast.flows.blocks import HoldfastDatabase, HoldfastSpec, HoldfastStorage, register
told = json.loads(sys.argv[1])
register()
HoldfastStorage(**told["storage"]).save("blocks-lab")
HoldfastDatabase(**told["database"]).save("blocks-main")
HoldfastSpec.from_file("saved.yaml").save("blocks-digits")
print("saved")
"""

COMMANDS = """
import json, sys
from pathlib import Path
from prefect.settings import PREFECT_API_URL, temporary_settings
from holdfast.cli import main
from holdfast.flows import serving
from holdfast.flows.serving import Serving
serving.is_healthy.__kwdefaults__["seconds"] = 30  # a server under load
commands = json.loads(sys.argv[1])
for words in commands:
    print("CODE", main(words), *words, flush=True)
with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
    print("CODE", main(commands[0]), flush=True)
url = PREFECT_API_URL.value()
with temporary_settings(restore_defaults={PREFECT_API_URL}):
    print("CODE", main(commands[0]), flush=True)
    Serving.here(url, url, is_protected=False, logs=Path("logs")).write()
    print("CODE", main(commands[0]), flush=True)
"""

FLOWS = """
import json, sys
from holdfast.flows.restore import restore
from holdfast.flows.search import search
from holdfast.flows.watch import watch
told = search("block:blocks-digits", ["name=byflow", "search.num_trials=1"], return_state=True)
print("search:", told.type.value, told.message)
told = restore("block:blocks-lab/byflow", database="block:blocks-main", return_state=True)
print("restore:", told.type.value, told.message)
told = watch(["block:blocks-lab"], database="block:blocks-main")
print("watch:", json.dumps(told["counts"]))
told = restore("s3://bucket/byflow", storage_options={"secret": "canary-in-a-form"}, return_state=True)
print("refused:", told.type.value, told.message)
"""


@pytest.fixture
def role(postgres: Postgres) -> Iterator[tuple[str, str]]:
    """An empty database of a role with a password; yield its URL without the password, and its name."""
    database = postgres.create(empty=True)
    with postgres.admin() as connection:
        connection.execute(sql.SQL("CREATE ROLE keeper LOGIN PASSWORD {}").format(sql.Literal(SECRETS[1])))
        connection.execute(sql.SQL("ALTER DATABASE {} OWNER TO keeper").format(sql.Identifier(database)))
    yield f"postgresql+psycopg://keeper@127.0.0.1:{postgres.port}/{database}", database
    with postgres.admin(database) as connection:
        connection.execute("REASSIGN OWNED BY keeper TO postgres")
    postgres.drop(database)
    with postgres.admin() as connection:
        connection.execute("DROP ROLE keeper")


def words_of(postgres: Postgres, database: str) -> str:
    """Return everything that a database holds, as text."""
    with postgres.admin(database) as connection:
        names = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        assert len(names) > 5
        query = sql.SQL("SELECT CAST(t AS text) FROM {} AS t")
        return "\n".join(str(row) for (name,) in names for row in connection.execute(query.format(sql.Identifier(name))))


def knows_the_blocks(folder: Path) -> bool:
    """Tell whether a Prefect server's database, or what is not in it yet, has the blocks: it is the tests' own then."""
    return any(b"blocks-lab" in file.read_bytes() for file in folder.glob("prefect.db*"))


def files(*folders: Path) -> Iterator[tuple[Path, bytes]]:
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                yield file, file.read_bytes()


def test_secrets_stay_in_the_blocks(
    s3: S3, make_lab: Any, postgres: Postgres, role: tuple[str, str], server_environment: dict[str, str]
) -> None:
    url, database = role
    lab: Lab = make_lab("blocks")
    lab.environment = {
        **server_environment,
        "XDG_CACHE_HOME": str(lab.folder / "cache"),
        "XDG_DATA_HOME": str(lab.folder / "data"),
    }
    bucket = s3.bucket()
    told = {
        "storage": {
            "location": f"{bucket}/runs",
            "endpoint": s3.endpoint,
            "region": "us-east-1",
            "key": SECRETS[0],
            "secret": SECRETS[0],
            "secret_options": {"config_kwargs": {"user_agent_extra": SECRETS[2]}},
        },
        "database": {"url": url, "password": SECRETS[1]},
    }
    places = {"storage": "block:blocks-lab", "database": "block:blocks-main"}
    lab.spec(name="saved", search={"num_trials": 2}, **places)
    ended = lab.python(SAVE, json.dumps(told))
    assert ended.output.endswith("saved\n"), ended.output

    said = lab.run(
        "run", lab.spec(name="blocked", search={"num_trials": 2}, **places), fault="checkpoint.committed:2", code=DIED
    )
    command = "holdfast restore block:blocks-lab/blocked --database block:blocks-main"
    assert f"after a crash: {command}\n" in said.output
    path = "block:blocks-lab/blocked"
    words = [str(lab.json("watch", "block:blocks-lab", "--database", "block:blocks-main", "--dry-run"))]
    assert f"'command': '{command}'" in words[0]
    watched = lab.run("watch", "block:blocks-lab", "--database", "block:blocks-main")
    assert "blocked: restored" in watched.output
    words += [said.output, watched.output]
    database_words = ["--database", "block:blocks-main"]
    commands: list[tuple[list[str], int]] = [
        (["show", path, *database_words], 0),
        (["list", "block:blocks-lab", *database_words, "--json"], 0),
        (["trials", path, *database_words], 0),
        (["checkpoints", path, "--verify", *database_words], 0),
        (["restore", path, "--plan", *database_words], 0),
        (["db", "show", "block:blocks-lab", *database_words], 0),
        (["validate", "block:blocks-digits"], 0),
        (["fork", path, "--name", "forked", "--storage", "block:blocks-lab", *database_words], 0),
        (["show", "block:blocks-nobody/x"], 2),
        (["show", "block:blocks-main/x"], 2),
        (["show", "block:blocks-lab/../x"], 2),
        (["show", "block:Lab"], 2),
        (["show", path, "--database", "block:blocks-lab"], 2),
        (["run", "block:blocks-lab"], 2),
    ]
    ended = lab.python(COMMANDS, json.dumps([command for command, _ in commands]))
    words.append(ended.output)
    codes = [int(line.split()[1]) for line in ended.output.splitlines() if line.startswith("CODE ")]
    # The first one once more: an API that is away, none at all, and the server that `holdfast up` left running.
    assert codes == [*(code for _, code in commands), 4, 4, 0], ended.output
    words.append(lab.python(FLOWS).output)
    text = "\n".join(words)
    assert "block:blocks-nobody names no block HoldfastStorage; saved ones: block:blocks-lab" in text
    assert "block:blocks-main is a HoldfastDatabase, and a HoldfastStorage is needed here" in text
    assert "leads out of the storage" in text
    assert "'block:Lab' names no block" in text
    assert "block:blocks-lab is a HoldfastStorage, and a HoldfastDatabase is needed here" in text
    assert "block:blocks-lab is a HoldfastStorage, and a HoldfastSpec is needed here" in text
    assert "Prefect's API at http://127.0.0.1:1/api does not answer" in text
    assert "Prefect's settings name no API; set PREFECT_API_URL" in text
    for told in ("search: COMPLETED", "restore: COMPLETED nothing is left to do", 'watch: {"'):
        assert told in text, words[-1]
    assert "refused: FAILED storage_options holds the credential 'secret'; Prefect keeps parameters" in text

    view = View(lab, "blocked")
    assert {run["parameters"]["spec"]["storage"] for run in view.flow_runs() if "spec" in run["parameters"]} == {
        places["storage"]
    }
    rows = words_of(postgres, database)
    assert places["storage"] in rows  # the text of the spec
    stored = ObjectRoot(f"{bucket}/runs", {**s3.options})
    names = list(stored.files(""))
    assert any(name.startswith("blocked/journal/") for name in names)
    assert "blocked/lease.json" in names
    servers = [folder for folder in Path(tempfile.gettempdir()).glob("holdfast-prefect-*") if knows_the_blocks(folder)]
    assert servers
    prefect = Path(server_environment["PREFECT_HOME"])
    for secret in SECRETS:
        assert secret not in text
        assert secret not in rows
        assert not [name for name in names if secret.encode() in (stored.read(name) or b"")]
        assert not [file for file, content in files(lab.folder, prefect, *servers) if secret.encode() in content]
