// The search reads a word with a dash before it as one to leave out: --use_cache is searched as use_cache.
const QUERY = 2; // type of a message to the search's worker
const { postMessage } = Worker.prototype;
Worker.prototype.postMessage = function (message, ...rest) {
  const asked = message?.type === QUERY ? { ...message, data: message.data.replace(/(^|\s)-+/g, "$1") } : message;
  return postMessage.call(this, asked, ...rest);
};
