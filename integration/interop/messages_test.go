package interop

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// messages has an edge between clients and a server of both protocols: the pools
// "h1" and "h2" speak to the same server.
type messages struct {
	*site
	brisk   string // the address of a listener that ends what is silent for a second
	handler *script
}

// script is a server that does with a path what a test says.
type script struct{ paths sync.Map }

func (s *script) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if do, ok := s.paths.Load(r.URL.Path); ok {
		do.(http.HandlerFunc)(w, r)
		return
	}
	peers.Handler(false).ServeHTTP(w, r)
}

// leg is a client of one protocol and a pool of one.
type leg struct {
	*messages
	client *http.Client
	quick  *http.Client // by the brisk listener
	pool   string
	path   string // of this test and leg alone
}

func (l *leg) url() string { return "https://" + host(l.pool) + l.path }

func (l *leg) serve(do http.HandlerFunc) { l.handler.paths.Store(l.path, do) }

func (l *leg) get(ctx context.Context) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, l.url(), nil)
	if err != nil {
		return nil, err
	}
	return l.quick.Do(request)
}

// each runs a test with each pair of protocols.
func (m *messages) each(name string, test func(t *testing.T, l *leg)) func(*testing.T) {
	return func(t *testing.T) {
		for _, front := range []string{"h1", "h2"} {
			for _, pool := range []string{"h1", "h2"} {
				t.Run(front+" to "+pool, func(t *testing.T) {
					t.Parallel()
					l := &leg{
						messages: m, pool: pool, path: fmt.Sprintf("/%s/%s/%s", name, front, pool),
						client: m.Client(t, m.address, front == "h2"), quick: m.Client(t, m.brisk, front == "h2"),
					}
					test(t, l)
				})
			}
		}
	}
}

// TestMessages: what the bodies of messages may be like, whatever both sides
// speak.
func TestMessages(t *testing.T) {
	m := &messages{site: newSite(t, ""), handler: new(script)}
	m.brisk = m.Address()
	backends := []*peers.Backend{m.Launch(t, goWith(m.handler), peers.Options{HTTP2: true})}
	m.pool("h1", backends, "  protocol: http1\n")
	m.pool("h2", backends, "  protocol: http2\n")
	m.WaitAcked(m.Apply(harness.Listener("brisk", m.brisk, "", "  timeouts: {idle: 1s}\n")+
		harness.Route("brisk-h1", "brisk", host("h1"), "h1", "")+harness.Route("brisk-h2", "brisk", host("h2"), "h2", "")), m.edge)
	t.Run("events", m.each("events", events))
	t.Run("long poll", m.each("poll", longPoll))
	t.Run("slow backend", m.each("upload", slowBackend))
	t.Run("slow client", m.each("download", slowClient))
	t.Run("early answer", m.each("early", earlyAnswer))
	t.Run("trailers", m.each("trailers", trailers))
	t.Run("early hints", m.each("hints", earlyHints))
	t.Run("pipelining", m.pipelining)
	t.Run("HTTP 1.0", m.http10)
	for _, pool := range []string{"h1", "h2"} {
		if stats := m.PoolStats(pool); stats.Errors != 0 {
			t.Errorf("pool %s has errors: %v", pool, stats.ErrorsByReason)
		}
	}
}

// events: each event of a stream arrives before the next is sent, and a client
// that leaves is seen to leave.
func events(t *testing.T, l *leg) {
	seen, left := make(chan struct{}), make(chan struct{})
	l.serve(func(w http.ResponseWriter, r *http.Request) {
		defer close(left)
		w.Header().Set("Content-Type", "text/event-stream")
		for i := 0; ; i++ {
			fmt.Fprintf(w, "data: %d\n\n", i)
			if http.NewResponseController(w).Flush() != nil {
				return
			}
			select {
			case <-seen:
			case <-r.Context().Done():
				return
			}
		}
	})
	ctx, leave := context.WithDeadline(t.Context(), soon())
	defer leave()
	response, err := l.get(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	lines := bufio.NewScanner(response.Body)
	for i := range 50 {
		if !lines.Scan() || lines.Text() != fmt.Sprintf("data: %d", i) {
			t.Fatalf("event %d: %q, %v", i, lines.Text(), lines.Err())
		}
		lines.Scan()
		seen <- struct{}{}
	}
	leave()
	arrives(t, left, "the client's leaving")
}

// arrives waits for something that must happen.
func arrives(t *testing.T, what <-chan struct{}, name string) {
	t.Helper()
	ctx, cancel := context.WithDeadline(t.Context(), soon())
	defer cancel()
	select {
	case <-what:
	case <-ctx.Done():
		t.Errorf("%s did not get through", name)
	}
}

// longPoll: a client that waits is not silent.
func longPoll(t *testing.T, l *leg) {
	l.serve(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(2500 * time.Millisecond)
		_, _ = io.WriteString(w, "news")
	})
	response, err := l.get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if body, err := io.ReadAll(response.Body); string(body) != "news" || err != nil || response.StatusCode != http.StatusOK {
		t.Errorf("%s, %q, %v", response.Status, body, err)
	}
}

// maxAhead bounds what is under way between a sender and a receiver that has
// stopped. Most of it is in buffers of the kernel, whose share is up to 36 MiB on a
// connection here (tcp_rmem and tcp_wmem).
const maxAhead = 40 << 20

// bulk is the size of a large body.
func bulk() int64 {
	if harness.Long() {
		return 1 << 30
	}
	return 48 << 20
}

// source is a large body that counts how much of it was taken.
type source struct {
	left  int64
	taken atomic.Int64
}

func (s *source) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	body := peers.Body(peers.Large)
	n := copy(p[:min(int64(len(p)), s.left)], body[s.taken.Load()%int64(len(body)):])
	s.left -= int64(n)
	s.taken.Add(int64(n))
	return n, nil
}

// sum is the hash of what a source gives.
func sum(r io.Reader) string {
	hash := sha256.New()
	n, err := io.Copy(hash, r)
	return fmt.Sprintf("%d bytes, %v, %x", n, err, hash.Sum(nil))
}

// bulkSum is that of a whole one.
var bulkSum = sync.OnceValue(func() string { return sum(&source{left: bulk()}) })

// standstill waits until no more is taken, and returns how much was.
func (s *source) standstill() int64 {
	last, since := int64(-1), time.Now()
	for time.Since(since) < 500*time.Millisecond {
		if now := s.taken.Load(); now != last {
			last, since = now, time.Now()
		}
		time.Sleep(10 * time.Millisecond)
	}
	return last
}

// slowBackend: a backend that stops reading for a while, longer than a client may
// be silent, makes the client wait, and the edge keeps little. Then all of the
// body gets there.
func slowBackend(t *testing.T, l *leg) {
	const first = 1 << 20
	goOn := make(chan struct{})
	l.serve(func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		n, _ := io.CopyN(hash, r.Body, first)
		<-goOn
		rest, err := io.Copy(hash, r.Body)
		fmt.Fprintf(w, "%d bytes, %v, %x", n+rest, err, hash.Sum(nil))
	})
	body := &source{left: bulk()}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, l.url(), body)
	if err != nil {
		t.Fatal(err)
	}
	request.ContentLength = bulk()
	ended := make(chan string, 1)
	go func() {
		response, err := l.quick.Do(request)
		if err != nil {
			ended <- err.Error()
			return
		}
		defer response.Body.Close()
		text, _ := io.ReadAll(response.Body)
		ended <- string(text)
	}()
	if ahead := body.standstill() - first; ahead > maxAhead {
		t.Errorf("%d MiB are under way to a backend that does not read", ahead>>20)
	}
	time.Sleep(2 * time.Second)
	close(goOn)
	if got := <-ended; got != bulkSum() {
		t.Errorf("the upload: %.200s, want %s", got, bulkSum())
	}
}

// slowClient is the same the other way.
func slowClient(t *testing.T, l *leg) {
	body := &source{left: bulk()}
	l.serve(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.CopyBuffer(struct{ io.Writer }{w}, body, make([]byte, 64<<10))
	})
	response, err := l.client.Get(l.url())
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	first := make([]byte, 1<<20)
	if _, err := io.ReadFull(response.Body, first); err != nil {
		t.Fatal(err)
	}
	if ahead := body.standstill() - int64(len(first)); ahead > maxAhead {
		t.Errorf("%d MiB are under way to a client that does not read", ahead>>20)
	}
	if got := sum(io.MultiReader(bytes.NewReader(first), response.Body)); got != bulkSum() {
		t.Errorf("the download: %s, want %s", got, bulkSum())
	}
}

// earlyAnswer: a client gets the refusal of a body that it is still sending.
func earlyAnswer(t *testing.T, l *leg) {
	l.serve(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "too much", http.StatusRequestEntityTooLarge)
	})
	for i := range 10 {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, l.url(), io.NopCloser(zeros{}))
		if err != nil {
			t.Fatal(err)
		}
		response, err := l.client.Do(request)
		if err != nil {
			t.Fatalf("upload %d: %v", i, err)
		}
		text, err := io.ReadAll(response.Body)
		response.Body.Close()
		if response.StatusCode != http.StatusRequestEntityTooLarge || string(text) != "too much\n" || err != nil {
			t.Fatalf("upload %d: %s, %q, %v", i, response.Status, text, err)
		}
	}
}

// trailers go both ways, announced or not.
func trailers(t *testing.T, l *leg) {
	l.serve(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Announced")
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%d bytes, %v", n, err)
		w.Header().Set("X-Announced", r.Trailer.Get("X-Sum"))
		w.Header().Set(http.TrailerPrefix+"X-Late", r.Trailer.Get("X-Other"))
	})
	for _, size := range []int{0, 1, 100_000} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, l.url(), io.NopCloser(bytes.NewReader(peers.Body(peers.Large)[:size])))
		if err != nil {
			t.Fatal(err)
		}
		request.Trailer = http.Header{"X-Sum": {"all of it"}, "X-Other": {"and more"}}
		response, err := l.client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(response.Body)
		response.Body.Close()
		if string(text) != fmt.Sprintf("%d bytes, <nil>", size) || err != nil {
			t.Errorf("%q, %v", text, err)
		}
		if response.Trailer.Get("X-Announced") != "all of it" || response.Trailer.Get("X-Late") != "and more" {
			t.Errorf("after %d bytes: trailers %v", size, response.Trailer)
		}
	}
}

// earlyHints get through before the answer is there.
func earlyHints(t *testing.T, l *leg) {
	hinted := make(chan struct{})
	l.serve(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		select {
		case <-hinted:
		case <-r.Context().Done():
		}
		_, _ = io.WriteString(w, "page")
	})
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
		if code != http.StatusEarlyHints || header.Get("Link") != "</style.css>; rel=preload" {
			return errors.New("not the hint that was sent")
		}
		close(hinted)
		return nil
	}})
	response, err := l.get(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if text, err := io.ReadAll(response.Body); string(text) != "page" || err != nil || response.Header.Get("Link") != "" {
		t.Errorf("%q, %v, %v", text, err, response.Header)
	}
}
