"""The asyncio gRPC process: validates, tokenizes, streams; never touches a device."""
