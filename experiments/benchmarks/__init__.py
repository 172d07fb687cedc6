"""What the library costs, measured beside other ways of doing the same."""
