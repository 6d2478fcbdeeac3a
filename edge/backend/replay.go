package backend

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// maxKept bounds what is kept of a request's body, in bytes, until an answer
// begins: a request that the backend turned away unread is sent again with it.
// It is above what a backend's window lets out at first.
const maxKept = 256 << 10

var errNotKept = errors.New("too much of the body was sent to send it again")

// replay is a client's body that several attempts may read from its beginning,
// one after another.
type replay struct {
	src io.ReadCloser
	// turn holds a token. Who took it reads src, or what is kept of it: an
	// attempt that is given up may still wait for the client, and what it gets is
	// the next one's.
	turn chan struct{}

	// Owned by the turn.
	kept  []byte
	total int64 // bytes read
	err   error // of src

	mu      sync.Mutex
	settled bool // there will be no other attempt
	current *attemptBody
	closed  bool // src is
	lost    bool // kept is not all
}

func newReplay(src io.ReadCloser) *replay {
	r := &replay{src: src, turn: make(chan struct{}, 1)}
	r.turn <- struct{}{}
	return r
}

// next begins an attempt. The one before gets nothing more.
func (r *replay) next() *attemptBody {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current != nil {
		r.current.end()
	}
	r.current = &attemptBody{r: r, ended: make(chan struct{})}
	return r.current
}

// whole reports whether another attempt could send all of the body.
func (r *replay) whole() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.lost && !r.closed
}

// settle says that the present attempt is the last: nothing more is kept.
func (r *replay) settle() {
	r.mu.Lock()
	r.settled = true
	over := r.current != nil && r.current.over()
	r.mu.Unlock()
	if over {
		r.close()
	}
}

// close closes the client's body, once.
func (r *replay) close() {
	r.mu.Lock()
	again := r.closed
	r.closed = true
	r.mu.Unlock()
	if !again {
		r.src.Close()
	}
}

func (r *replay) isSettled() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.settled
}

// keep remembers bytes of src that an attempt has read. The turn is the caller's.
func (r *replay) keep(p []byte, reader *attemptBody) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total += int64(len(p))
	switch {
	case r.lost || r.settled && reader == r.current:
	case len(r.kept)+len(p) > maxKept:
		r.kept, r.lost = nil, true
	default:
		r.kept = append(r.kept, p...)
	}
}

// attemptBody is the body as one attempt reads it.
type attemptBody struct {
	r     *replay
	at    int64
	ended chan struct{} // closed when the attempt reads no more
	once  sync.Once
}

// Read implements io.Reader.
func (b *attemptBody) Read(p []byte) (int, error) {
	r := b.r
	select {
	case <-r.turn:
	case <-b.ended:
		return 0, http.ErrBodyReadAfterClose
	}
	defer func() { r.turn <- struct{}{} }()
	switch {
	case b.over():
		return 0, http.ErrBodyReadAfterClose
	case b.at < r.total && b.at >= int64(len(r.kept)):
		return 0, errNotKept
	case b.at < r.total:
		n := copy(p, r.kept[b.at:])
		b.at += int64(n)
		return n, nil
	case r.err != nil:
		return 0, r.err
	}
	n, err := r.src.Read(p)
	r.keep(p[:n], b)
	r.err = err
	b.at += int64(n)
	if r.isSettled() && b.at >= int64(len(r.kept)) {
		r.kept = nil
	}
	return n, err
}

// Close implements io.Closer. It ends a Read that waits for its turn; one that
// waits for the client ends with the client's body.
func (b *attemptBody) Close() error {
	b.end()
	if b.r.isSettled() {
		b.r.close()
	}
	return nil
}

func (b *attemptBody) end() { b.once.Do(func() { close(b.ended) }) }

func (b *attemptBody) over() bool {
	select {
	case <-b.ended:
		return true
	default:
		return false
	}
}
