"""The whole thing: processes, kills, disks, packaging, documents."""
