package frontend

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// bufferSize holds two full TLS records.
	bufferSize = 32 << 10
	// lingerBytes and lingerTime bound what is read of a body that the backend
	// did not want, to keep the connection.
	lingerBytes = 256 << 10
	lingerTime  = 50 * time.Millisecond
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// minBodyRate is what a client must send of a body of known length, in bytes per
// second of our waiting for it, once timeouts.idle has passed. It is far below
// what any network gives; without it, a byte now and then would hold a request for
// ever. A body of unknown length may be a stream, on which only silence is bounded.
const minBodyRate = 100

// requestBody is a client's body. The upstream may read it until the handler
// returns, and not a moment longer.
type requestBody struct {
	src     io.ReadCloser
	request *http.Request // whose Trailer is complete when src has ended
	bytes   atomic.Int64
	guard   *stallGuard

	filterTrailer func(http.Header)

	mu       sync.Mutex
	idle     sync.Cond // no Read is under way
	reading  bool
	closed   bool
	finished bool
	err      error // of the last Read
}

// newRequestBody calls stalled when the client sends nothing for the idle time,
// or too little. filter removes from the trailer what must not go on.
func newRequestBody(request *http.Request, idle time.Duration, stalled func(), filter func(http.Header)) *requestBody {
	b := &requestBody{src: request.Body, request: request, filterTrailer: filter}
	b.idle.L = &b.mu
	b.guard = newStallGuard(idle, stalled)
	if request.ContentLength > 0 {
		b.guard.most = func() time.Duration {
			return idle + time.Duration(b.bytes.Load())*time.Second/minBodyRate
		}
	}
	return b
}

// Read implements io.Reader.
func (b *requestBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return 0, http.ErrBodyReadAfterClose
	}
	b.reading = true
	b.mu.Unlock()
	b.guard.begin()
	n, err := b.src.Read(p)
	b.guard.end()
	b.bytes.Add(int64(n))
	if errors.Is(err, io.EOF) {
		b.filterTrailer(b.request.Trailer) // what came, announced or not
	}
	b.mu.Lock()
	b.reading = false
	if err != nil {
		b.err = err
	}
	b.idle.Broadcast()
	b.mu.Unlock()
	return n, err
}

// Close ends reading. It does not close the client's body, which would read on.
func (b *requestBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return nil
}

// failed reports whether the client did not send the body as announced.
func (b *requestBody) failed() bool {
	if b == nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err != nil && !errors.Is(b.err, io.EOF)
}

// isShort reports whether the client ended the body of an HTTP/2 request before its
// content-length, for which x/net/http2 has no error of its own. HTTP/1.1 can't.
func (b *requestBody) isShort() bool {
	if b == nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err != nil && strings.Contains(b.err.Error(), "declared a Content-Length")
}

// finish ends all reading before the handler returns. For HTTP/1.1 it makes sure
// that the rest of the body is not taken for the next request: it reads a small
// rest, or has the connection closed after the answer.
func (b *requestBody) finish(w http.ResponseWriter, control *http.ResponseController, http1, aborting bool) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	again := b.finished
	b.closed, b.finished = true, true
	if again {
		return
	}
	defer b.guard.stop()
	if errors.Is(b.err, io.EOF) {
		return
	}
	linger := lingerTime
	if aborting || !http1 || b.err != nil {
		linger = 0
	}
	if http1 || b.reading {
		_ = control.SetReadDeadline(time.Now().Add(linger)) // also ends a Read under way
	}
	for b.reading {
		b.idle.Wait()
	}
	if !http1 || aborting {
		return
	}
	if b.err == nil {
		_, b.err = io.CopyN(io.Discard, b.src, lingerBytes)
	}
	if errors.Is(b.err, io.EOF) {
		_ = control.SetReadDeadline(time.Time{}) // fails only on a dead connection
		return
	}
	closeAfterAnswer(w)
}

// closeAfterAnswer has net/http close the connection once the answer is
// written, even when its header was sent before. That is what MaxBytesReader
// does when its limit is exceeded.
func closeAfterAnswer(w http.ResponseWriter) {
	over := http.MaxBytesReader(w, io.NopCloser(strings.NewReader("x")), 0)
	_, _ = over.Read(make([]byte, 1)) // the error is the purpose
}

// stallGuard ends a read or write for which a client is waited for.
type stallGuard struct {
	limit time.Duration
	most  func() time.Duration // of all waits together, nil: no bound. Set before the first begin
	since atomic.Int64         // start of the wait under way in Unix ns, 0: none
	spent atomic.Int64         // ns in waits that are over, if most is set
	timer *time.Timer

	mu      sync.Mutex
	stopped bool
}

// newStallGuard calls stalled when a wait takes longer than limit.
func newStallGuard(limit time.Duration, stalled func()) *stallGuard {
	g := &stallGuard{limit: limit}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.timer = time.AfterFunc(limit, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.stopped {
			return
		}
		left := g.left()
		if left <= 0 {
			stalled()
			return
		}
		g.timer.Reset(left)
	})
	return g
}

// left is how long the wait under way, or the next one, may last at least.
func (g *stallGuard) left() time.Duration {
	since := g.since.Load()
	if since == 0 {
		return g.limit
	}
	waited := time.Since(time.Unix(0, since))
	left := g.limit - waited
	if g.most != nil {
		left = min(left, g.most()-time.Duration(g.spent.Load())-waited)
	}
	return left
}

func (g *stallGuard) begin() { g.since.Store(time.Now().UnixNano()) }

func (g *stallGuard) end() {
	since := g.since.Swap(0)
	if g.most != nil {
		g.spent.Add(time.Now().UnixNano() - since)
	}
}

// stop returns when stalled is not running and will not run.
func (g *stallGuard) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopped = true
	g.timer.Stop()
}
