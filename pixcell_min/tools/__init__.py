"""Tools around the core; run one as `python -m pixcell_min.tools.NAME`."""
