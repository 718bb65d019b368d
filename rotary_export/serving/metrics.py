"""Names, descriptions and bounds of the metrics of a served model, beside the server's own."""

KERNEL_PATH = (
    "rotary_export_kernel_path",
    "What computes the rotary nodes; the value is 1.",
)
REQUESTS_TOGETHER = (
    "rotary_export_requests_together",
    "Number of requests of a batch.",
)
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)  # of REQUESTS_TOGETHER
