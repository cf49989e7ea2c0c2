"""Server reflection, by which clients such as grpcurl and buf curl find the services."""

from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: grpc.aio.Server, services: list[str]) -> None:
    """Reflection under its old name, which the package serves, and under v1, which newer clients ask for first."""
    names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME, _REFLECTION_V1]
    servicer = reflection.aio.ReflectionServicer(service_names=names, pool=_MethodPool())
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    # The messages of v1 are the same, byte for byte.
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )
    _describe_reflection_v1(reflection_pb2.DESCRIPTOR)


class _MethodPool:
    """The pool of descriptors, in which methods are found too: protobuf's own knows services and messages only."""

    def __getattr__(self, name: str) -> Any:
        return getattr(descriptor_pool.Default(), name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        pool = descriptor_pool.Default()
        try:
            return pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            descriptor = pool.FindServiceByName(service)
            if method not in descriptor.methods_by_name:
                raise
            return descriptor.file


def _describe_reflection_v1(alpha: Any) -> None:
    """Make the descriptor of v1 known, which no package brings: who lists the services asks for each one's too."""
    described = descriptor_pb2.FileDescriptorProto()
    alpha.CopyToProto(described)
    described.name = "grpc/reflection/v1/reflection.proto"
    described.package = described.package.replace("v1alpha", "v1")
    for message in described.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace("v1alpha", "v1")
    for service in described.service:
        for method in service.method:
            method.input_type = method.input_type.replace("v1alpha", "v1")
            method.output_type = method.output_type.replace("v1alpha", "v1")
    descriptor_pool.Default().AddSerializedFile(described.SerializeToString())
