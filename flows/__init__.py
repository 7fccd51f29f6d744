from holdfast import references


def _blocks() -> references.Blocks:
    from holdfast.flows.blocks import Lookup  # imports Prefect, which only a reference needs

    return Lookup()


def blocks_here() -> None:
    """Let this process look up references to Prefect's blocks; importing the flows' package does the same."""
    references.use(_blocks)


blocks_here()
