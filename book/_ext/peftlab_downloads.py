"""The menu "Download this page": the notebook with all its outputs, and printing; _static/downloads.js adds the rest.

The theme calls its entries by file endings, and the one that prints ".pdf".
"""

NAMES = {".ipynb": "Notebook, with outputs", ".md": "Source of this page", ".pdf": "Print this page"}


def name_downloads(app, pagename, templatename, context, doctree) -> None:
    for group in context.get("header_buttons", []):
        if group.get("label") == "download-buttons":
            for button in group["buttons"]:
                button["text"] = button["tooltip"] = NAMES[button["text"]]
                if button["label"] == "download-pdf-button":
                    button["icon"] = "fas fa-print"


def setup(app):
    app.add_js_file("made.js", loading_method="defer")
    app.add_js_file("downloads.js", loading_method="defer")
    app.connect("html-page-context", name_downloads, priority=800)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
