// Which downloads the site has, with their sizes in bytes: `make pdf`, `make epub` and `make archive` write it anew.
window.peftlabMade = {};
