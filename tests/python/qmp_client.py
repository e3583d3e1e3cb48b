"""Drives a control socket through qemu.qmp, the official client.

Usage: qmp_client.py SCENARIO FOLDER, where FOLDER has the sockets control.sock and second.sock of one server, each
in the hands of a monitor of its own. Each scenario is a function below; it fails by raising.
`tests/tests/qmp_client.rs` starts the server and runs them.
"""

import asyncio
import sys
from pathlib import Path

from qemu.qmp import EventListener, ExecuteError, QMPClient


async def connect(folder, socket="control.sock"):
    client = QMPClient(socket)
    await client.connect(str(folder / socket))
    return client


async def refused(client, command, arguments=None, error_class="GenericError"):
    """Asserts that the server refuses the command, with a class and a sentence, and returns the sentence."""
    try:
        answer = await client.execute(command, arguments)
    except ExecuteError as error:
        assert error.error_class == error_class, f"{command}: {error.error_class}, not {error_class}"
        assert len(str(error)) > 10, f"{command}: '{error}' explains nothing"
        return str(error)
    raise AssertionError(f"{command} {arguments} was not refused but answered {answer}")


async def node_names(client):
    return {node["node-name"] for node in await client.execute("query-named-block-nodes")}


async def export_ids(client):
    return {export["id"] for export in await client.execute("query-block-exports")}


def image(folder, size=1 << 20):
    path = folder / "image.raw"
    path.write_bytes(bytes(size))
    return str(path)


async def greeting(folder):
    """Version in the greeting and the answer agree, and clients may gate on QEMU's number."""
    client = await connect(folder)
    version = await client.execute("query-version")
    assert version["qemu"] == {"major": 10, "minor": 0, "micro": 2}, version
    assert client.greeting.QMP.version == version, client.greeting

    commands = {command["name"] for command in await client.execute("query-commands")}
    assert EXPECTED_COMMANDS <= commands, EXPECTED_COMMANDS - commands
    schema = await client.execute("query-qmp-schema")
    listed = {entry["name"] for entry in schema if entry["meta-type"] == "command"}
    assert listed == commands, listed ^ commands
    await client.disconnect()


async def reconnect(folder):
    """The socket takes its next client when one has gone, in good order or not, and starts negotiation afresh."""
    client = await connect(folder)
    await client.execute("query-version")
    await client.disconnect()

    _, writer = await asyncio.open_unix_connection(str(folder / "control.sock"))
    writer.write(b'{"execute": "query-ver')
    writer.close()
    await writer.wait_closed()

    client = await connect(folder)
    await client.execute("query-version")
    await client.disconnect()


async def nodes(folder):
    client = await connect(folder)
    await client.execute("blockdev-add", {"driver": "null-co", "node-name": "null0", "size": 1 << 30})
    await client.execute("blockdev-add", {"driver": "file", "node-name": "file0", "filename": image(folder)})
    await client.execute("blockdev-add", {"driver": "raw", "node-name": "raw0", "file": "file0"})

    named = {node["node-name"]: node for node in await client.execute("query-named-block-nodes")}
    assert {"null0", "file0", "raw0"} <= named.keys(), named.keys()
    assert [named[name]["drv"] for name in ("null0", "file0", "raw0")] == ["null-co", "file", "raw"], named
    assert named["null0"]["image"]["virtual-size"] == 1 << 30, named["null0"]
    assert named["file0"]["image"]["filename"] == str(folder / "image.raw"), named["file0"]
    assert not named["raw0"]["ro"], named["raw0"]

    await client.execute("block_resize", {"node-name": "raw0", "size": 2 << 20})
    assert (folder / "image.raw").stat().st_size == 2 << 20

    await refused(client, "blockdev-del", {"node-name": "file0"})  # raw0 stands on it
    for name in ("raw0", "file0", "null0"):
        await client.execute("blockdev-del", {"node-name": name})
    assert not await node_names(client)
    await client.disconnect()


async def exports(folder):
    client = await connect(folder)
    await client.execute("blockdev-add", {"driver": "null-co", "node-name": "null0", "size": 1 << 20})
    export = {
        "type": "vhost-user-blk",
        "id": "export0",
        "node-name": "null0",
        "addr": {"type": "unix", "path": str(folder / "disk.sock")},
    }

    await client.execute("block-export-add", export)
    answer = await client.execute("query-block-exports")
    expected = {"id": "export0", "type": "vhost-user-blk", "node-name": "null0", "shutting-down": False}
    assert answer == [expected], answer
    assert (folder / "disk.sock").is_socket()

    await refused(client, "block-export-add", export)  # its id is taken
    await refused(client, "blockdev-del", {"node-name": "null0"})  # the export uses it

    with client.listener("BLOCK_EXPORT_DELETED") as deleted:
        await client.execute("block-export-del", {"id": "export0"})
        event = await asyncio.wait_for(deleted.get(), LIMIT_S)
    assert event["data"] == {"id": "export0"}, event
    assert event["timestamp"].keys() == {"seconds", "microseconds"}, event
    assert not await export_ids(client)
    await client.execute("blockdev-del", {"node-name": "null0"})
    await client.disconnect()


async def errors(folder):
    client = await connect(folder)
    await refused(client, "no-such-command", error_class="CommandNotFound")
    await refused(client, "qmp_capabilities", error_class="CommandNotFound")
    await refused(client, "block-export-del", {"id": "nobody"})
    await refused(client, "blockdev-del", {"node-name": "nobody"})
    await refused(client, "blockdev-add", {"driver": "no-such-driver", "node-name": "node0"})
    await refused(client, "blockdev-add", {"driver": "null-co", "node-name": "1-is-no-letter"})
    await refused(client, "blockdev-add", {"driver": "file", "node-name": "node0", "filename": "/nobody/here"})

    for wrong in ({}, {"node-name": 1}, {"node-name": "node0", "more": True}, {"driver": "null-co", "size": "big"}):
        await refused(client, "blockdev-add", wrong)
    # Sentences name what is wrong.
    assert "filename" in await refused(client, "blockdev-add", {"driver": "file", "node-name": "node0"})
    assert "more" in await refused(client, "query-version", {"more": 1})
    assert not await node_names(client), "a refused command left a node"
    await client.disconnect()


async def iothreads(folder):
    client = await connect(folder)
    thread = {"qom-type": "iothread", "id": "thread0", "poll-max-ns": 4096}
    await client.execute("object-add", thread)
    await refused(client, "object-add", thread)
    await refused(client, "object-add", {"qom-type": "no-such-type", "id": "object0"})
    types = {kind["name"] for kind in await client.execute("qom-list-types", {"implements": "user-creatable"})}
    assert "iothread" in types, types

    await client.execute("blockdev-add", {"driver": "null-co", "node-name": "null0", "size": 1 << 20})
    address = {"type": "unix", "path": str(folder / "disk.sock")}
    export = {"type": "vhost-user-blk", "id": "export0", "node-name": "null0", "addr": address, "iothread": "thread0"}
    await client.execute("block-export-add", export)
    with client.listener("BLOCK_EXPORT_DELETED") as deleted:
        await client.execute("block-export-del", {"id": "export0", "mode": "hard"})
        await asyncio.wait_for(deleted.get(), LIMIT_S)
    await client.execute("blockdev-del", {"node-name": "null0"})
    await client.execute("object-del", {"id": "thread0"})
    await refused(client, "object-del", {"id": "thread0"})
    await client.disconnect()


async def two_monitors(folder):
    """Two clients work at once, on one graph; both hear of what happens to it."""
    first, second = await connect(folder), await connect(folder, "second.sock")
    await first.execute("blockdev-add", {"driver": "null-co", "node-name": "null0", "size": 1 << 20})
    assert await node_names(second) == {"null0"}

    async def add_and_remove(client, name):
        for _ in range(20):
            await client.execute("blockdev-add", {"driver": "null-co", "node-name": name, "size": 1 << 20})
            assert name in await node_names(client)
            await client.execute("blockdev-del", {"node-name": name})

    await asyncio.gather(add_and_remove(first, "one"), add_and_remove(second, "two"))
    assert await node_names(first) == {"null0"}

    address = {"type": "unix", "path": str(folder / "disk.sock")}
    export = {"type": "vhost-user-blk", "id": "export0", "node-name": "null0", "addr": address}
    await first.execute("block-export-add", export)
    heard_first, heard_second = EventListener("BLOCK_EXPORT_DELETED"), EventListener("BLOCK_EXPORT_DELETED")
    first.register_listener(heard_first)
    second.register_listener(heard_second)
    await second.execute("block-export-del", {"id": "export0"})
    for heard in (heard_first, heard_second):
        assert (await asyncio.wait_for(heard.get(), LIMIT_S))["data"] == {"id": "export0"}
    await first.disconnect()
    await second.disconnect()


async def leave(folder):
    """`quit` is answered before the connection ends; the Rust side sees the process go."""
    client = await connect(folder)
    assert await client.execute("quit") == {}
    try:
        await client.disconnect()
    except (EOFError, OSError):
        pass  # Which side closes first is open.


LIMIT_S = 20
EXPECTED_COMMANDS = {
    "qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "blockdev-add", "blockdev-del",
    "blockdev-reopen", "query-named-block-nodes", "query-block", "query-blockstats", "block-export-add",
    "block-export-del", "query-block-exports", "object-add", "object-del", "qom-list-types", "block_resize",
    "block-set-write-threshold", "quit",
}  # fmt: skip
SCENARIOS = (greeting, reconnect, nodes, exports, errors, iothreads, two_monitors, leave)


def main(scenario, folder):
    run = {function.__name__: function for function in SCENARIOS}[scenario]
    asyncio.run(asyncio.wait_for(run(Path(folder)), 3 * LIMIT_S))


if __name__ == "__main__":
    main(*sys.argv[1:])
