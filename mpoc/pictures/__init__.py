"""Pictures of a compressed file: one self-contained HTML page, or SVG and PNG by matplotlib."""
