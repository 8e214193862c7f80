"""The front end's half of the store: adapters by name, their versions, and copies on disk.

`Catalog` is the way in; `FolderWatcher` feeds it. Below, each owns one kind of state:

- `Registry`: names, with their source and versions (`records`);
- `Lifecycle`: which version is live, who leases one, when it goes;
- `Residency`: how far each content has come, on disk or in the engine;
- `DiskTier`: the copies on disk, their holds and their eviction.
"""
