package http2

import "slices"

// stream is a stream that is not closed, or whose last bytes are not consumed.
type stream struct {
	id uint32

	// What the peer may send. Both windows are as RFC 9113 section 6.9 has them: a
	// change of SETTINGS can make them negative.
	window     int   // bytes that the peer may send
	owed       int   // consumed, not given back to the peer yet
	unconsumed int   // given to the caller, who holds them
	left       int64 // of Content-Length, or exchange.UnknownLength
	received   bool  // the peer's END_STREAM has come

	// What this side may send.
	sendWindow int
	sendLeft   int64 // likewise
	sent       bool  // END_STREAM has been sent

	began    uint32 // the connection's epoch when it opened
	early    uint8  // informational responses that came
	headed   bool   // the final head of the response has come (client) or been sent (server)
	toHead   bool   // the request's method is HEAD
	bodiless bool   // the message that comes has no content by its nature
	mute     bool   // so has the one that goes
	tunnel   bool   // CONNECT
	refused  bool   // the body is thrown away
	protocol string // that an extended CONNECT has asked for (client)
}

// over reports whether both sides have ended the stream.
func (s *stream) over() bool { return s.received && s.sent }

// unanswered reports whether nothing of a response has come.
func (s *stream) unanswered() bool { return !s.headed && s.early == 0 }

// table holds streams by their numbers, in order. Streams of a connection open in
// order and are few, so that a slice finds them faster than a map and costs an
// idle connection nothing.
type table struct {
	all  []*stream
	last *stream // looked up last
	free []*stream
	keep int // streams that are kept for use again
}

// Streams that are kept for use again: few for each of many clients, more for
// connections that many clients share.
const (
	keepServer = 8
	keepClient = 64
)

func (t *table) find(id uint32) (int, bool) {
	return slices.BinarySearchFunc(t.all, id, func(s *stream, id uint32) int {
		switch {
		case s.id < id:
			return -1
		case s.id > id:
			return 1
		}
		return 0
	})
}

func (t *table) get(id uint32) *stream {
	if t.last != nil && t.last.id == id {
		return t.last
	}
	if at, ok := t.find(id); ok {
		t.last = t.all[at]
		return t.last
	}
	return nil
}

// add makes a stream whose number is higher than all others'.
func (t *table) add(id uint32) *stream {
	var s *stream
	if n := len(t.free); n > 0 {
		s, t.free = t.free[n-1], t.free[:n-1]
	} else {
		s = new(stream)
	}
	*s = stream{id: id}
	t.all = append(t.all, s)
	t.last = s
	return s
}

func (t *table) remove(id uint32) {
	at, ok := t.find(id)
	if !ok {
		return
	}
	s := t.all[at]
	t.last = nil
	t.all = slices.Delete(t.all, at, at+1)
	if len(t.free) < t.keep {
		t.free = append(t.free, s)
	}
}

// ending is how a stream came to its end, which says what frames may still come
// on it (RFC 9113 section 5.1).
type ending uint8

const (
	unknown ending = iota // never opened, or so long ago that we have forgotten
	byEnd                 // both sides have ended it
	byPeer                // the peer has reset it
	byUs                  // we have
)

// graves remembers the streams that ended last, so that frames on them are
// judged rightly without memory that grows.
type graves struct {
	ring      []grave
	next      int
	forgotten uint32 // the highest stream that was remembered and is no more
}

type grave struct {
	stream uint32
	ending ending
}

// maxGraves is how many a connection remembers. Frames on a stream that ended
// before those are thrown away and cost the peer credit.
const maxGraves = 64

func (g *graves) bury(id uint32, how ending) {
	if len(g.ring) < maxGraves {
		g.ring = append(g.ring, grave{id, how})
		return
	}
	g.forgotten = max(g.forgotten, g.ring[g.next].stream)
	g.ring[g.next] = grave{id, how}
	g.next = (g.next + 1) % maxGraves
}

func (g *graves) find(id uint32) ending {
	for i := range g.ring {
		if g.ring[i].stream == id {
			return g.ring[i].ending
		}
	}
	return unknown
}
