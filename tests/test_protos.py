"""The wire contract: stubs match the protos, numbers never change, names follow the style."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
)

from deltamux.v1 import adapters_pb2, control_pb2, inference_pb2

ROOT = Path(__file__).parents[1]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))
MODULES = {"inference": inference_pb2, "adapters": adapters_pb2, "control": control_pb2}
# What a client may rely on: every field and enum value, its number, its type.
PINNED = Path(__file__).with_name("pinned_contract.txt")


def files() -> list[descriptor_pb2.FileDescriptorProto]:
    parsed = []
    for module in MODULES.values():
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        parsed.append(file)
    return parsed


def messages(within: str, found: list[DescriptorProto]) -> list[tuple[str, DescriptorProto]]:
    every = []
    for message in found:
        name = f"{within}.{message.name}"
        every += [(name, message), *messages(name, list(message.nested_type))]
    return every


def all_messages() -> list[tuple[str, DescriptorProto]]:
    return [pair for file in files() for pair in messages(file.package, list(file.message_type))]


def all_enums() -> list[tuple[str, EnumDescriptorProto]]:
    top = [(file.package, enum) for file in files() for enum in file.enum_type]
    nested = [(name, enum) for name, message in all_messages() for enum in message.enum_type]
    return [(f"{within}.{enum.name}", enum) for within, enum in (*top, *nested)]


def kind(field: FieldDescriptorProto) -> str:
    repeated = "repeated " * (field.label == FieldDescriptorProto.LABEL_REPEATED)
    optional = "optional " * field.proto3_optional
    name = (
        field.type_name or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    )
    return repeated + optional + name


def contract() -> list[str]:
    lines = [
        f"{name}.{field.name} = {field.number} {kind(field)}"
        for name, message in all_messages()
        for field in message.field
    ]
    lines += [
        f"{name}.{value.name} = {value.number}"
        for name, enum in all_enums()
        for value in enum.value
    ]
    for file in files():
        for service in file.service:
            for rpc in service.method:
                stream = "stream " * rpc.server_streaming
                lines.append(
                    f"{file.package}.{service.name}.{rpc.name}"
                    f"({rpc.input_type}) returns ({stream}{rpc.output_type})"
                )
    return lines


def test_nothing_of_the_contract_changed():
    """Fields may be added (and pinned here); none may be renamed, renumbered or retyped."""
    assert sorted(PINNED.read_text().splitlines()) == sorted(contract())


def test_stubs_match_the_protos(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc", reason="needs grpcio-tools of the dev extra")
    names = [str(proto.relative_to(ROOT / "protos")) for proto in PROTOS]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"-I{ROOT / 'protos'}", *outputs, *names]) == 0
    stubs = ROOT / "server" / "deltamux" / "v1"
    generated = sorted((tmp_path / "deltamux" / "v1").iterdir())
    assert {path.name for path in generated} | {"__init__.py"} == {
        path.name for path in stubs.iterdir() if path.suffix in (".py", ".pyi")
    }
    same_generator = metadata.version("grpcio-tools") in (stubs / "control_pb2_grpc.py").read_text()
    for path in generated:
        ours, fresh = (stubs / path.name).read_text(), path.read_text()
        assert (ours == fresh) if same_generator else (essence(ours) == essence(fresh)), path.name


def essence(stub: str) -> list[str]:
    """What another version of the generator writes alike: the schema, and what is called."""
    serialized = re.findall(r"AddSerializedFile\((.*)\)", stub)
    called = re.findall(r"'(/deltamux\.v1\.[\w./]+)'", stub)
    declared = re.findall(r"^ *class (\w+)", stub, re.MULTILINE)
    return serialized or sorted({*called, *declared})


def test_files_follow_the_style():
    for file, path in zip(files(), MODULES, strict=True):
        assert file.syntax == "proto3"
        assert file.package == "deltamux.v1"
        assert file.name == f"deltamux/v1/{path}.proto"


def test_names_follow_the_style():
    for name, message in all_messages():
        if message.options.map_entry:
            continue
        assert re.fullmatch(r"([A-Z][a-z0-9]+)+|[A-Z]+", message.name), name
        for field in message.field:
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name), f"{name}.{field.name}"


def test_enums_follow_the_style():
    """The values carry the enum's name, and zero means that nothing was said."""
    for name, enum in all_enums():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        assert (enum.value[0].number, enum.value[0].name) == (0, f"{prefix}UNSPECIFIED"), name
        assert all(value.name.startswith(prefix) for value in enum.value), name


def test_services_follow_the_style():
    """Each call has a request and a response of its own."""
    used = []
    for file in files():
        for service in file.service:
            assert service.name.endswith("Service")
            for rpc in service.method:
                package = f".{file.package}."
                assert rpc.input_type == f"{package}{rpc.name}Request"
                assert rpc.output_type == f"{package}{rpc.name}Response"
                used += [rpc.input_type, rpc.output_type]
    assert len(used) == len(set(used))


def test_every_proto_has_its_stub():
    assert {proto.stem for proto in PROTOS} == set(MODULES)
