package frontend

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// observer keeps what it sees as a line.
type observer struct {
	watching atomic.Bool
	mu       sync.Mutex
	seen     []string
}

func (o *observer) Watching() bool { return o.watching.Load() }

func (o *observer) See(x *exchange.Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.seen = append(o.seen, fmt.Sprintf("%s %s %s %s %s %s%s %d %q %v first=%t resumed=%t miss=%d %s %d/%d", x.Listener, x.Pool, x.Protocol, x.Name, x.Method, x.Host, x.Path,
		x.Status, x.Reason, x.Blame, x.Exchange.First, x.ClientResumed, x.ClientMiss, x.Exchange.Endpoint, x.In, x.Out))
	if x.Duration <= 0 || x.Ended.IsZero() {
		o.seen = append(o.seen, "without times")
	}
}

// TestObserver: each request is seen when it is over, without its query, as long as
// somebody watches.
func TestObserver(t *testing.T) {
	o := &observer{}
	cfg := Config{Observer: o}
	cfg.Upstream = upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		x.Endpoint = "10.0.0.1:1"
		if r.URL.Path != "/cut" {
			_, _ = io.Copy(io.Discard, r.Body)
			return textResponse(200, "fine"), nil
		}
		x.Status, x.Reason, x.Blame = 502, "reset", resealv1.Failure_BLAME_BACKEND
		return nil, statusError{502, "reset"}
	}}.onLoops()
	e := newEdgeOf(t, cfg)
	client := e.client(false)
	get := func(path string) {
		t.Helper()
		response, err := client.Post("https://app.test"+path, "", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
	}
	get("/before")
	o.watching.Store(true)
	get("/fine?secret")
	get("/cut?secret")
	eventually(t, "two are seen", func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		// Its client may have had its answer just before it was over.
		o.seen = slices.DeleteFunc(o.seen, func(line string) bool { return strings.Contains(line, "/before") })
		return len(o.seen) == 2
	})
	o.watching.Store(false)
	get("/after")
	client.CloseIdleConnections()
	o.mu.Lock()
	defer o.mu.Unlock()
	want := []string{
		`main web HTTP/1.1 app.test POST app.test/fine 200 "" BLAME_UNSPECIFIED first=false resumed=false miss=12 10.0.0.1:1 4/4`,
		`main web HTTP/1.1 app.test POST app.test/cut 502 "reset" BLAME_BACKEND first=false resumed=false miss=12 10.0.0.1:1 `,
	}
	if len(o.seen) != 2 || o.seen[0] != want[0] || !strings.HasPrefix(o.seen[1], want[1]) {
		t.Errorf("saw\n%s\nwant\n%s", strings.Join(o.seen, "\n"), strings.Join(want, "\n"))
	}
}
