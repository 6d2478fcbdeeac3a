package bench

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Load is a number of requests that clients make at the same time, each with a
// connection of its own that it keeps for as long as the proxy lets it.
type Load struct {
	// Address of the proxy.
	Address string
	// TLS says how clients verify the proxy. ServerName is set per client.
	TLS *tls.Config
	// Hosts that are asked for. Each client asks for one of them.
	Hosts []string
	// Path that is asked for, of package peers.
	Path string
	// Requests in all.
	Requests int
	// Clients that make them.
	Clients int
	// AbortEvery makes a client go away in the middle of every n-th response.
	// 0: never.
	AbortEvery int
	// Together connects all clients first; then all of them make their first
	// request at the same time.
	Together bool
	// RetryRefused makes clients try again when a connection was refused or
	// ended before any byte of a request was sent.
	RetryRefused bool
	// RetryUnavailable makes clients try again after 502, 503 and 504.
	RetryUnavailable bool
	// Halfway is called once, by Run itself, when half of the requests are
	// made. The clients go on meanwhile. May be nil.
	Halfway func() error
}

// Outcome is what became of a Load.
type Outcome struct {
	// Done requests were answered with the right content.
	Done int64
	// Aborted requests were given up by the client, on purpose.
	Aborted int64
	// Failed requests got no answer, or a wrong one.
	Failed int64
	// Retried counts further tries.
	Retried int64
	// Errors are the first failures.
	Errors []string
	// Took is how long all of it took.
	Took time.Duration
	// P50 and P99 are how long the correctly answered requests of the newest Load
	// took, retries included.
	P50, P99 time.Duration
}

// add sums up outcomes.
func (o *Outcome) add(other Outcome) {
	o.Done += other.Done
	o.Aborted += other.Aborted
	o.Failed += other.Failed
	o.Retried += other.Retried
	o.Errors = append(o.Errors, other.Errors...)
	o.Took += other.Took
	o.P50, o.P99 = other.P50, other.P99
}

const keptErrors = 5

// running is a Load under way.
type running struct {
	*Load
	ctx     context.Context
	next    atomic.Int64
	half    chan struct{}
	start   chan struct{} // closed when all clients may begin
	ready   sync.WaitGroup
	done    atomic.Int64
	aborted atomic.Int64
	failed  atomic.Int64
	retried atomic.Int64

	mu     sync.Mutex
	errors []string
	times  []time.Duration
}

// Run makes the requests. It returns an error when ctx ends or Halfway fails;
// failed requests are in the outcome.
func (l *Load) Run(ctx context.Context) (Outcome, error) {
	begin := time.Now()
	r := &running{Load: l, ctx: ctx, half: make(chan struct{}), start: make(chan struct{})}
	r.ready.Add(l.Clients)
	var clients sync.WaitGroup
	for i := range l.Clients {
		clients.Go(func() { r.client(i) })
	}
	r.ready.Wait()
	close(r.start)
	var err error
	if l.Halfway != nil {
		select {
		case <-r.half:
			err = l.Halfway()
		case <-ctx.Done():
		}
	}
	clients.Wait()
	slices.Sort(r.times)
	return Outcome{
		Done: r.done.Load(), Aborted: r.aborted.Load(), Failed: r.failed.Load(), Retried: r.retried.Load(),
		Errors: r.errors, Took: time.Since(begin),
		P50: r.quantile(50), P99: r.quantile(99),
	}, errors.Join(err, ctx.Err())
}

// client makes requests until there are enough.
func (r *running) client(index int) {
	c := newClient(r.Load, index)
	defer c.close()
	if r.Together {
		if err := c.connect(r.ctx, false); err != nil {
			r.fail(fmt.Errorf("connecting: %w", err))
		}
	}
	r.ready.Done()
	<-r.start
	var times []time.Duration
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.times = append(r.times, times...)
	}()
	for {
		i := r.next.Add(1)
		if i > int64(r.Requests) || r.ctx.Err() != nil {
			return
		}
		if r.Halfway != nil && i == int64(r.Requests/2) {
			close(r.half)
		}
		abort := r.AbortEvery > 0 && i%int64(r.AbortEvery) == 0
		begin := time.Now()
		switch err := r.request(c, abort); {
		case err != nil:
			r.fail(err)
		case abort:
			r.aborted.Add(1)
		default:
			r.done.Add(1)
			times = append(times, time.Since(begin))
		}
	}
}

// quantile is how long that percentage of the requests took at most. The times
// are sorted.
func (r *running) quantile(percent int) time.Duration {
	if len(r.times) == 0 {
		return 0
	}
	return r.times[(len(r.times)*percent+99)/100-1]
}

// request makes one request, with the retries that the load allows. A kept
// connection that turned out to be closed is not a failure for any HTTP client
// (RFC 9112 section 9.3.1).
func (r *running) request(c *client, abort bool) error {
	deadline := time.Now().Add(requestTimeout)
	stale := false
	for {
		err := c.get(r.ctx, abort)
		var wait time.Duration
		switch {
		case err == nil:
			return nil
		case !stale && errors.As(err, &staleError{}):
			stale = true
		case r.RetryRefused && refused(err), r.RetryUnavailable && unavailable(err):
			wait = retryPause
		default:
			return err
		}
		if r.ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		r.retried.Add(1)
		time.Sleep(wait)
	}
}

func (r *running) fail(err error) {
	r.failed.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.errors) < keptErrors {
		r.errors = append(r.errors, err.Error())
	}
}

// refused reports whether the proxy did not take the connection.
func refused(err error) bool {
	return errors.As(err, &unstartedError{}) && (errors.Is(err, syscall.ECONNREFUSED) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF))
}

// unavailable reports whether the proxy said that it can't reach the backend.
func unavailable(err error) bool {
	var status statusError
	if !errors.As(err, &status) {
		return false
	}
	switch status.code {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}
