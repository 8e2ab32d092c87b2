"""Several models in the browser: what they write to the same prompt, what was measured, and what was done to them."""
