"""Presets: functions that return a whole configuration. `gptjax presets` lists them."""
