package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// cost is what one request costs the edge. But for waits none of it depends on how
// fast the machine is, and little on how busy: so a bound that is missed is a
// regression.
type cost struct {
	// calls are system calls, but for waits and those of the scheduler of goroutines.
	calls float64
	// waits are those for something to be ready. The sooner peers send more, the
	// fewer they are, so that they differ from machine to machine.
	waits float64
	// toClient and toBackend are TLS records that the edge made.
	toClient, toBackend float64
	// allocations of memory.
	allocations float64
}

// TestCosts bounds what a request costs the edge in system calls, TLS records and
// allocations. Bounds are some more than it costs now; whoever makes it cost less
// lowers them.
func TestCosts(t *testing.T) {
	c := newCosts(t)
	get := func(address string) func(*testing.T) func() {
		return func(t *testing.T) func() { return c.http1(t, address, "GET", peers.Small, nil) }
	}
	streams := func(address string, n int) func(*testing.T) func() {
		return func(t *testing.T) func() { return c.http2(t, address, n) }
	}
	tests := []struct {
		name     string
		requests int // per call of what start returns
		calls    int // so many that what asking for the counters costs, which varies, counts little
		start    func(t *testing.T) func()
		bound    cost
	}{
		{"HTTP1", 1, 1200, get(c.http1Pool), cost{calls: 6, waits: 5, toClient: 1.05, toBackend: 1.05, allocations: 40}},
		{"HTTP1 to HTTP2 pool", 1, 1200, get(c.http2Pool), cost{calls: 7, waits: 6, toClient: 1.6, toBackend: 1.1, allocations: 45}},
		{"HTTP1 upload of 1 KB", 1, 1200, func(t *testing.T) func() {
			return c.http1(t, c.http1Pool, "POST", peers.Echo, peers.Body(peers.Small))
		}, cost{calls: 6, waits: 6.5, toClient: 1.05, toBackend: 1.05, allocations: 40}},
		{"HTTP2", 1, 1200, streams(c.http1Pool, 1), cost{calls: 6, waits: 5, toClient: 1.1, toBackend: 1.05, allocations: 35}},
		{"HTTP2 with 20 streams at once", 20, 60, streams(c.http1Pool, 20), cost{calls: 4, waits: 1.5, toClient: 0.8, toBackend: 1.05, allocations: 35}},
		{"HTTP2 to HTTP2 pool", 1, 1200, streams(c.http2Pool, 1), cost{calls: 7, waits: 6, toClient: 1.6, toBackend: 1.1, allocations: 35}},
		{"HTTP2 to HTTP2 pool with 20 streams at once", 20, 60, streams(c.http2Pool, 20), cost{calls: 1, waits: 1, toClient: 0.6, toBackend: 0.3, allocations: 50}},
		{"download of 10 MB", 1, 20, func(t *testing.T) func() { return c.http1(t, c.http1Pool, "GET", peers.Large, nil) },
			cost{calls: 320, waits: 400, toClient: 650, toBackend: 1.1, allocations: 900}},
		{"upload of 10 MB", 1, 20, func(t *testing.T) func() {
			return c.http1(t, c.http1Pool, "POST", "/sink", peers.Body(peers.Large))
		}, cost{calls: 320, waits: 400, toClient: 1.1, toBackend: 650, allocations: 900}},
		{"connection with a full handshake", 1, 100, func(t *testing.T) func() { return c.connections(t, nil) },
			cost{calls: 26, waits: 24, toClient: 6.1, toBackend: 1.05, allocations: 700}},
		{"connection that is resumed", 1, 100, func(t *testing.T) func() { return c.connections(t, tls.NewLRUClientSessionCache(1)) },
			cost{calls: 26, waits: 23, toClient: 5.1, toBackend: 1.05, allocations: 650}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			do := test.start(t)
			for range 20 {
				do() // until connections and buffers are there
			}
			got, seen := c.measure(t, test.calls*test.requests, func() {
				for range test.calls {
					do()
				}
			})
			t.Logf("%.1f system calls and %.1f waits (%s), records %.2f to the client, %.2f to the backend, %.0f allocations",
				got.calls, got.waits, seen, got.toClient, got.toBackend, got.allocations)
			for _, check := range []struct {
				what       string
				got, bound float64
			}{
				{"system calls", got.calls, test.bound.calls},
				{"waits", got.waits, test.bound.waits},
				{"records to the client", got.toClient, test.bound.toClient},
				{"records to the backend", got.toBackend, test.bound.toBackend},
				{"allocations", got.allocations, test.bound.allocations},
			} {
				if check.got > check.bound {
					t.Errorf("%s: %.2f per request, must be at most %.2f", check.what, check.got, check.bound)
				}
			}
		})
	}
}

// costs is an edge with wiretaps on both sides.
type costs struct {
	*world
	edge                 *harness.Edge
	http1Pool, http2Pool string // where clients connect, through a wiretap
	fronts, backs        []*wiretap
	perf                 string // path of the program
	idle                 float64
}

func newCosts(t *testing.T) *costs {
	c := &costs{world: newWorldOf(t, harness.NewShipped(t)), perf: harness.Need(t, "perf")}
	mux := http.NewServeMux()
	mux.Handle("/", peers.Handler(false))
	mux.HandleFunc("/sink", func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	c.StartControlPlane()
	c.edge = c.StartEdge("one", "")
	manifest := harness.Certificate("site", c.Pair)
	for _, pool := range []struct {
		name  string
		http2 bool
		front *string
	}{{"http1", false, &c.http1Pool}, {"http2", true, &c.http2Pool}} {
		backend := c.Launch(t, func(_ context.Context, o peers.Options) (*peers.Backend, error) { return peers.GoWith(o, mux) }, peers.Options{HTTP2: pool.http2})
		address := c.Address()
		front, back := newWiretap(t, address), newWiretap(t, backend.Address)
		c.fronts, c.backs = append(c.fronts, front), append(c.backs, back)
		*pool.front = front.address()
		manifest += c.Pool(pool.name, []*peers.Backend{{Address: back.address()}}, "  protocol: "+pool.name+"\n") +
			harness.Listener(pool.name, address, "", "  pool: "+pool.name+"\n")
	}
	c.WaitAcked(c.Apply(manifest), c.edge)
	c.edge.WaitReady()
	c.allocations()
	c.idle = -c.allocations() + c.allocations() // what asking costs
	return c
}

// allocations of the edge so far.
func (c *costs) allocations() float64 { return c.edge.Metrics().Sum("go_memstats_mallocs_total") }

func (c *costs) records() (toClient, toBackend int) {
	for i := range c.fronts {
		toClient += c.fronts[i].records().fromServer
		toBackend += c.backs[i].records().fromClient
	}
	return toClient, toBackend
}

// measure is what each of n requests costs. seen says which system calls there were.
func (c *costs) measure(t *testing.T, n int, do func()) (per cost, seen string) {
	t.Helper()
	calls := c.countCalls(t)
	allocations := c.allocations()
	client, backend := c.records()
	counts := calls(do)
	clientAfter, backendAfter := c.records()
	per = cost{
		toClient: float64(clientAfter-client) / float64(n), toBackend: float64(backendAfter-backend) / float64(n),
		allocations: (c.allocations() - allocations - c.idle) / float64(n),
	}
	var parts []string
	for _, name := range callNames {
		each := float64(counts[name]) / float64(n)
		if name == "epoll_pwait" {
			per.waits = each
		} else {
			per.calls += each
		}
		if each > 0 {
			parts = append(parts, fmt.Sprintf("%s %.1f", name, each))
		}
	}
	return per, strings.Join(parts, ", ")
}

// callNames are the system calls that count.
var callNames = []string{
	"read", "write", "writev", "recvfrom", "sendto", "recvmsg", "sendmsg", "splice",
	"epoll_pwait", "epoll_ctl", "accept4", "connect", "close", "shutdown", "fcntl", "setsockopt", "getsockopt",
}

// countCalls has perf count the edge's system calls while do runs.
func (c *costs) countCalls(t *testing.T) func(do func()) map[string]int {
	t.Helper()
	dir := t.TempDir() // without commas, which separate files for perf
	control, ack, output := filepath.Join(dir, "control"), filepath.Join(dir, "ack"), filepath.Join(dir, "output")
	if err := errors.Join(syscall.Mkfifo(control, 0o600), syscall.Mkfifo(ack, 0o600)); err != nil {
		t.Fatal(err)
	}
	var events []string
	for _, name := range callNames {
		events = append(events, "syscalls:sys_enter_"+name)
	}
	perf, err := process.Start(process.Config{Path: c.perf, Args: []string{
		"stat", "-x", ",", "-o", output, "-e", strings.Join(events, ","), "-p", strconv.Itoa(c.edge.PID()),
		"-D", "-1", "--control", "fifo:" + control + "," + ack,
	}})
	if err != nil {
		t.Fatal(err)
	}
	stop := func() {
		perf.Signal(syscall.SIGINT)
		<-perf.Done()
	}
	// Both ends are opened for reading and writing, so that nobody waits for the other.
	to, err := os.OpenFile(control, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	from, err := os.OpenFile(ack, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		_, _ = to.Close(), from.Close()
	})
	answers := bufio.NewReader(from)
	command := func(word string) {
		_ = from.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(to, word+"\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := answers.ReadString('\n'); err != nil {
			t.Fatalf("perf does not %s: %v; it printed:\n%s", word, err, perf.Output())
		}
	}
	return func(do func()) map[string]int {
		command("enable")
		do()
		command("disable")
		stop()
		return perfCounts(t, output)
	}
}

// perfCounts reads what perf stat -x , has written: value, unit, event, and more.
func perfCounts(t *testing.T, path string) map[string]int {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[string]int)
	for line := range strings.Lines(string(text)) {
		fields := strings.Split(line, ",")
		if len(fields) < 3 {
			continue
		}
		if name, ok := strings.CutPrefix(fields[2], "syscalls:sys_enter_"); ok {
			n, err := strconv.Atoi(fields[0])
			if err != nil {
				t.Fatalf("perf counted no %s: %q", name, line)
			}
			counts[name] = n
		}
	}
	if counts["read"] == 0 {
		t.Fatalf("perf counted nothing:\n%s", text)
	}
	return counts
}

// dial opens a TLS connection that ends with the test.
func (c *costs) dial(t *testing.T, address, protocol string) *tls.Conn {
	t.Helper()
	config := c.ClientTLS()
	config.NextProtos = []string{protocol}
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// http1 returns what makes one request of a connection that is kept.
func (c *costs) http1(t *testing.T, address, method, path string, body []byte) func() {
	t.Helper()
	conn := c.dial(t, address, "http/1.1")
	reader := bufio.NewReaderSize(conn, 64<<10)
	text := fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: %s\r\n", method, path, harness.SiteName)
	if body != nil {
		text = fmt.Appendf(text, "Content-Length: %d\r\n", len(body))
	}
	text = append(append(text, "\r\n"...), body...)
	request, err := http.NewRequest(method, "https://"+harness.SiteName+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if _, err := conn.Write(text); err != nil {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(reader, request)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != http.StatusOK {
			t.Fatal(response.Status, err)
		}
	}
}

// http2 returns what makes n requests at once, in one record.
func (c *costs) http2(t *testing.T, address string, n int) func() {
	t.Helper()
	conn := c.dial(t, address, "h2")
	var out, block bytes.Buffer
	framer := http2.NewFramer(&out, bufio.NewReaderSize(conn, 64<<10))
	encoder := hpack.NewEncoder(&block)
	flush := func() {
		if _, err := out.WriteTo(conn); err != nil {
			t.Fatal(err)
		}
	}
	out.WriteString(http2.ClientPreface)
	// The peer may send all that the test asks for, so that it waits for no window.
	if err := errors.Join(framer.WriteSettings(), framer.WriteWindowUpdate(0, 1<<30)); err != nil {
		t.Fatal(err)
	}
	flush()
	next := uint32(1)
	return func() {
		for range n {
			block.Reset()
			for _, field := range []hpack.HeaderField{
				{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"},
				{Name: ":authority", Value: harness.SiteName}, {Name: ":path", Value: peers.Small},
			} {
				_ = encoder.WriteField(field)
			}
			if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: next, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true}); err != nil {
				t.Fatal(err)
			}
			next += 2
		}
		flush()
		for open := n; open > 0; {
			frame, err := framer.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			switch frame := frame.(type) {
			case *http2.RSTStreamFrame, *http2.GoAwayFrame:
				t.Fatal(frame)
			case *http2.SettingsFrame:
				if !frame.IsAck() {
					if err := framer.WriteSettingsAck(); err != nil {
						t.Fatal(err)
					}
				}
			case *http2.DataFrame:
				if frame.StreamEnded() {
					open--
				}
			}
		}
	}
}

// connections returns what makes a connection with one request. With a cache they
// are resumed.
func (c *costs) connections(t *testing.T, cache tls.ClientSessionCache) func() {
	t.Helper()
	config := c.ClientTLS()
	config.NextProtos, config.ClientSessionCache = []string{"http/1.1"}, cache
	text := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", peers.Small, harness.SiteName)
	first := true
	return func() {
		socket, err := net.Dial("tcp", c.http1Pool)
		if err != nil {
			t.Fatal(err)
		}
		conn := tls.Client(socket, config)
		defer func() { _ = conn.Close() }()
		if _, err := conn.Write(text); err != nil {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != http.StatusOK {
			t.Fatal(response.Status, err)
		}
		if got, want := conn.ConnectionState().DidResume, cache != nil && !first; got != want {
			t.Fatalf("resumed: %v, want %v", got, want)
		}
		first = false
	}
}
