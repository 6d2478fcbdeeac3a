package frontend

import (
	"net/http"
	"time"

	"github.com/reseal/reseal/edge/http1"
	"github.com/reseal/reseal/edge/loop"
)

// lane is what the connections of one loop share: memory that is lent for a call.
// Nobody who holds it calls what may come back to it.
type lane struct {
	loop     *loop.Loop
	event    http1.Event // what a machine has found
	out      []byte      // what goes to a client
	record   []byte      // of the access log
	requests spares[request]
	h2       http2Lane

	date   string // for the field of that name, as of second
	second int64
}

const (
	// keptOut bounds what a lane keeps of out, in bytes.
	keptOut = 512 << 10
	// keptSpares bounds the requests, and the streams, that a lane keeps for those that
	// come.
	keptSpares = 256
)

// written takes back what out has become.
func (l *lane) written(out []byte) {
	if cap(out) <= keptOut {
		l.out = out[:0]
	}
}

// today is the present time as Date has it (RFC 9110 section 5.6.7).
func (l *lane) today(now time.Time) string {
	if second := now.Unix(); second != l.second || l.date == "" {
		l.second, l.date = second, now.UTC().Format(http.TimeFormat)
	}
	return l.date
}

// spares are requests, or streams, that are over and without content.
type spares[T any] struct{ all []*T }

// take returns one of them, or a new one.
func (s *spares[T]) take() *T {
	last := len(s.all) - 1
	if last < 0 {
		return new(T)
	}
	t := s.all[last]
	s.all[last] = nil
	s.all = s.all[:last]
	return t
}

// keep takes one that nobody refers to any more, and which the caller has emptied.
func (s *spares[T]) keep(t *T) {
	if len(s.all) < keptSpares {
		s.all = append(s.all, t)
	}
}
