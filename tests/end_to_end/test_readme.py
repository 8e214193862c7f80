"""The examples of the README do what it says, against the server that it says."""

import json
import re
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from deltamux.cli import main
from deltamux.client import Client
from deltamux.demo.server import Server

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_server_info_names_each_family_once(demo_server: Server):
    with Client(demo_server.target, timeout=60) as client:
        families = list(client.server_info().families)
    assert "lora" in families and families == sorted(set(families))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python(demo_server: Server, capsys: pytest.CaptureFixture[str]):
    (example,) = blocks("python")
    exec(example.replace("localhost:8000", demo_server.target), {})
    assert capsys.readouterr().out == "GOOD MORNING\ntbbq zbeavat"


@pytest.mark.parametrize("asked", [["good morning\n"], ["--chat", "good morning"]])
def test_a_terminal(asked: list[str], demo_server: Server, capsys: pytest.CaptureFixture[str]):
    target = ("--target", demo_server.target, "--timeout", "60")
    assert main(["generate", *asked, "--adapter", "upper-case", *target]) == 0
    assert main(["adapters", "list", *target]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("GOOD MORNING\n")
    assert re.search(r"^upper-case +[0-9a-f]{12} +lora +12 +device ", shown, re.M), shown


def curl(channel: grpc.Channel, method: str, data: str) -> list[dict[str, object]]:
    """What grpcurl does: asks the server for the schema, then sends JSON by it."""
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service, _, name = method.partition("/")
    rpc = pool.FindServiceByName(service).FindMethodByName(name)
    request = json_format.Parse(data, GetMessageClass(rpc.input_type)())
    call = channel.unary_stream if rpc.server_streaming else channel.unary_unary
    replies = call(
        f"/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(rpc.output_type).FromString,
    )(request, timeout=60)
    every = list(replies) if rpc.server_streaming else [replies]
    return [json.loads(json_format.MessageToJson(reply)) for reply in every]


def test_grpcurl(demo_server: Server):
    (example,) = blocks("sh")
    commands = example.replace("\\\n", " ").strip().splitlines()
    pattern = r"grpcurl -plaintext (?:-d '(.*)' +)?localhost:8000 (\S+)"
    with grpc.insecure_channel(demo_server.target) as channel:
        replies = {
            method: curl(channel, method, data or "{}")
            for data, method in (re.fullmatch(pattern, command).groups() for command in commands)
        }
    generated, listed, health = replies.values()
    assert "".join(str(reply.get("text", "")) for reply in generated) == "GOOD MORNING"
    assert {"upper-case", "rot13"} <= {adapter["name"] for adapter in listed[0]["adapters"]}
    assert health == [{"status": "SERVING"}]
