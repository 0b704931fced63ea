// Which downloads the site has, with their sizes in bytes: `make pdf` and `make archive` write this file anew.
window.peftlabMade = {};
