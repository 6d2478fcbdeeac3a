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
	requests []*request  // that are over
	h2       http2Lane

	date   string // for the field of that name, as of second
	second int64
}

const (
	// keptOut bounds what a lane keeps of out, in bytes.
	keptOut = 512 << 10
	// keptRequests bounds the requests that a lane keeps for those that come.
	keptRequests = 256
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

// blank is a request without content.
func (l *lane) blank() *request {
	last := len(l.requests) - 1
	if last < 0 {
		return new(request)
	}
	q := l.requests[last]
	l.requests[last] = nil
	l.requests = l.requests[:last]
	return q
}

// recycle takes a request that nobody refers to any more.
func (l *lane) recycle(q *request) {
	if len(l.requests) < keptRequests {
		*q = request{}
		l.requests = append(l.requests, q)
	}
}
