package crossing

import (
	"sync"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// word is what one loop tells another about an exchange.
type word struct {
	c        *crossing
	kind     kind
	end      bool
	n        int // bytes: of data, consumed or sent
	response exchange.Response
	trailers exchange.Fields
	err      error
}

type kind int8

const (
	begins kind = iota
	data
	ended
	consumed
	aborted
	informational
	response
	failed
	sentOn
)

// lane takes what one loop says to another, in its order.
type lane struct {
	to  *loop.Loop
	run func() // arrive

	mu     sync.Mutex
	posted bool
	words  []word
	bytes  []byte // of data, in the order of the words

	// Of the loop that takes them: memory to be used again.
	spareWords []word
	spareBytes []byte
}

// maxSpare bounds what a lane keeps for data, in bytes, and maxSpareWords for words.
const (
	maxSpare      = 256 << 10
	maxSpareWords = 1024
)

func newLane(to *loop.Loop) *lane {
	l := &lane{to: to}
	l.run = l.arrive
	return l
}

// say adds a word. It reports false if the other loop has ended.
func (l *lane) say(w word, p []byte) bool {
	l.mu.Lock()
	l.bytes = append(l.bytes, p...)
	if !l.merge(&w) {
		l.words = append(l.words, w)
	}
	posted := l.posted
	l.posted = true
	l.mu.Unlock()
	return posted || l.to.Post(l.run)
}

// merge adds to the last word, if that says the same. l.mu is held.
func (l *lane) merge(w *word) bool {
	if len(l.words) == 0 {
		return false
	}
	last := &l.words[len(l.words)-1]
	if last.c != w.c || last.kind != w.kind || last.end {
		return false
	}
	switch w.kind {
	case data, consumed, sentOn:
		last.n += w.n
		last.end = w.end
		return true
	}
	return false
}

// arrive hands out the words that there are. A panic costs the word on which it
// happens; the others are handed out later.
func (l *lane) arrive() {
	words, bytes := l.take()
	at, offset := 0, 0
	defer func() {
		if at < len(words) {
			l.again(words[at:], bytes[offset:])
			return
		}
		l.keep(words, bytes)
	}()
	for at < len(words) {
		w := &words[at]
		var p []byte
		if at++; w.kind == data {
			p = bytes[offset : offset+w.n]
			offset += w.n
		}
		if w.c.up == l {
			w.c.arriveFar(w, p)
		} else {
			w.c.arriveNear(w, p)
		}
	}
}

// take takes all words.
func (l *lane) take() ([]word, []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	words, bytes := l.words, l.bytes
	l.words, l.bytes = l.spareWords, l.spareBytes
	l.spareWords, l.spareBytes = nil, nil
	l.posted = false
	return words, bytes
}

// keep keeps the memory of what take returned.
func (l *lane) keep(words []word, bytes []byte) {
	clear(words)
	if cap(words) <= maxSpareWords {
		l.spareWords = words[:0]
	}
	if cap(bytes) <= maxSpare {
		l.spareBytes = bytes[:0]
	}
}

// again puts words back in front of those that have come since.
func (l *lane) again(words []word, bytes []byte) {
	l.mu.Lock()
	l.words, l.bytes = append(words, l.words...), append(bytes, l.bytes...)
	posted := l.posted
	l.posted = true
	l.mu.Unlock()
	if !posted {
		l.to.Post(l.run)
	}
}
