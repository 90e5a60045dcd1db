"""From prompts to pictures: a loaded folder as something to call."""
