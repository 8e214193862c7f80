"""The engine's half of the store: adapters in host memory and in slots of the device.

`AdapterCache` is the way in; it owns an `Entry` for each adapter that was asked for. Below it:

- `MemoryTiers`: one move at a time for each adapter, from disk to the host and on to a slot;
- `HostCache`: what has been parsed;
- `DeviceSlots`: who has which slot;
- `Loader`: the threads that read, parse and copy.
"""
