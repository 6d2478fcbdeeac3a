package integration

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// reuseModes are HAProxy's, whose meaning connections.reuse has.
var reuseModes = []string{"never", "safe", "aggressive", "always"}

// reuseScripts are what clients a, b, c and d do, each with one connection. "a"
// is a request with its answer, "a+" one whose answer waits for "a-", "a." the
// end of the client's connection, and "a!" a request whose answer ends the
// backend's connection.
var reuseScripts = []string{
	"a a a",             // a client's requests in turn
	"a b c",             // first requests while a connection is idle
	"a a b b c c",       // clients in turn
	"a b a b c a b c",   // clients by turns
	"a+ b a- b a",       // the only connection is in use
	"a+ b+ c+ a- b- c-", // no connection is ever idle
	"a b+ a b- c a b c", // a later request takes another client's connection
	"a a b+ a c b- c d", // as above, when it has been reused
	"a a. b b. c",       // clients that leave
	"a a! a b a",        // a backend that closes
	"a b a b a c d",     // reused connections are left to first requests
}

// reuseMixed are scripts for HTTP/1 clients and HTTP/2 backends.
var reuseMixed = []string{
	"a a b b c c",
	"a b a b c a b c",
	"a+ b a- b a",
	"a+ b+ c+ a- b- c-",
	"a b+ a b- c a b c",
	"a a! a b a",
}

// reuseStreams are scripts for HTTP/2 on both sides, where a client may have
// several requests at a time.
var reuseStreams = []string{
	"a a b b a",
	"a b a+ b a-",       // a connection with another client's request on it
	"a a+ a+ b c a- a-", // several requests of a client
	"a a+ b a- b",
}

// reuseKind is what clients and backends speak.
type reuseKind struct {
	name                 string
	clientsH2, backendH2 bool
	scripts              []string
}

var reuseKinds = []reuseKind{
	{"h1", false, false, reuseScripts},
	{"h1-h2", false, true, reuseMixed},
	{"h2", true, true, reuseStreams},
}

// TestReuseModes plays the scripts before HAProxy and before an edge, and
// compares which requests went over the same connection. Both follow one model
// of http-reuse and differ in what the model leaves open and the reference of
// connections.reuse states. The same requests need a new connection in any case.
func TestReuseModes(t *testing.T) {
	w := newWorld(t)
	// One event loop: with several, an idle connection of the client's loop goes before
	// one of another that was used later.
	w.Env = []string{"GOMAXPROCS=1"}
	rehearsal := &rehearsal{world: w, page: &http.Client{Transport: &http.Transport{}}, held: make(map[string]chan struct{})}
	t.Cleanup(rehearsal.page.CloseIdleConnections)
	plays := make(map[string][]play)
	var all []play
	for _, mode := range reuseModes {
		for _, kind := range reuseKinds {
			for _, script := range kind.scripts {
				play := play{name: fmt.Sprintf("p%d", len(all)), mode: mode, script: script, reuseKind: kind}
				all, plays[mode] = append(all, play), append(plays[mode], play)
			}
		}
	}
	rehearsal.backends = map[bool]*peers.Backend{false: rehearsal.backend(t, false), true: rehearsal.backend(t, true)}
	haproxy := rehearsal.haproxy(t, all)
	w.StartControlPlane()
	edges := make(map[string]reuseProxy)
	for _, mode := range reuseModes {
		edges[mode] = rehearsal.edge(mode, plays[mode])
	}
	for _, mode := range reuseModes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			for _, play := range plays[mode] {
				t.Run(play.reuseKind.name+" "+play.script, func(t *testing.T) { rehearsal.compare(t, play, haproxy, edges[mode]) })
			}
		})
	}
}

func (r *rehearsal) compare(t *testing.T, play play, haproxy, edge reuseProxy) {
	theirs := r.perform(t, haproxy, play)
	if want := predict(play, byHAProxy); theirs != want {
		t.Errorf("HAProxy's connections by request: %s, want %s", theirs, want)
	}
	ours := r.perform(t, edge, play)
	if want := predict(play, byReseal); ours != want {
		t.Errorf("Reseal's connections by request: %s, want %s; HAProxy %s", ours, want, theirs)
	}
	if !play.clientsH2 && openings(ours) != openings(theirs) {
		t.Errorf("new connections by request: HAProxy %s, Reseal %s", openings(theirs), openings(ours))
	}
}

// openings keeps of a partition which requests opened a connection.
func openings(partition string) string {
	opened := '0'
	return strings.Map(func(r rune) rune {
		switch {
		case r < '0' || r > '9':
			return r
		case r > opened:
			opened = r
			return '+'
		}
		return '-'
	}, partition)
}

// play is a script in one mode. Its pool has its name.
type play struct {
	name, mode, script string
	reuseKind
}

func (p play) host() string { return p.name + "." + harness.SiteName }

// reuseProxy is a proxy that scripts are played before.
type reuseProxy struct {
	address string
	// busy is how many of a play's connections are in use, -1 if the proxy can't
	// tell.
	busy func(t *testing.T, play play) int
}

// rehearsal is what both proxies share.
type rehearsal struct {
	*world
	backends map[bool]*peers.Backend // by whether they speak HTTP/2
	page     *http.Client            // for the edges' metrics
	mu       sync.Mutex
	held     map[string]chan struct{} // by number of the request
}

// hold returns the channel that lets the answer to a request end.
func (r *rehearsal) hold(request string) chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held[request] == nil {
		r.held[request] = make(chan struct{})
	}
	return r.held[request]
}

// ServeHTTP implements http.Handler: a backend that tells the port of its peer.
func (r *rehearsal) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	if request.Header.Get("End") != "" {
		w.Header().Set("Connection", "close")
	}
	_, _ = io.WriteString(w, request.RemoteAddr)
	if number := request.Header.Get("Hold"); number != "" {
		_ = http.NewResponseController(w).Flush()
		<-r.hold(number)
	}
}

// performance is a play before one proxy.
type performance struct {
	*rehearsal
	t       *testing.T
	play    play
	proxy   reuseProxy
	clients map[byte]*http.Client
	waiting map[byte][]*reuseRequest // whose answers wait
	made    []*reuseRequest          // all, in order
}

type reuseRequest struct {
	client   byte
	number   string
	response *http.Response
	peer     string // the backend's
}

// perform returns each request's client and the number of its connection, in
// order of appearance.
func (r *rehearsal) perform(t *testing.T, proxy reuseProxy, play play) string {
	p := &performance{
		rehearsal: r, t: t, play: play, proxy: proxy,
		clients: make(map[byte]*http.Client), waiting: make(map[byte][]*reuseRequest),
	}
	defer p.end()
	for _, step := range strings.Fields(play.script) {
		client := step[0]
		switch step[1:] {
		case ".":
			p.client(client).CloseIdleConnections()
			delete(p.clients, client)
		case "+":
			p.waiting[client] = append(p.waiting[client], p.begin(client, "Hold"))
		case "-":
			p.finish(p.waiting[client][0])
			p.waiting[client] = p.waiting[client][1:]
		case "!":
			p.finish(p.begin(client, "End"))
		default:
			p.finish(p.begin(client, ""))
		}
		p.rest()
	}
	var peers, partition []string
	for _, request := range p.made {
		i := slices.Index(peers, request.peer)
		if i < 0 {
			i, peers = len(peers), append(peers, request.peer)
		}
		partition = append(partition, fmt.Sprintf("%c%d", request.client, i+1))
	}
	return strings.Join(partition, " ")
}

func (p *performance) client(name byte) *http.Client {
	if p.clients[name] == nil {
		p.clients[name] = p.Client(p.t, p.proxy.address, p.play.clientsH2)
	}
	return p.clients[name]
}

// begin sends a request and reads the answer up to its backend's peer.
func (p *performance) begin(client byte, how string) *reuseRequest {
	p.t.Helper()
	request, err := http.NewRequestWithContext(p.t.Context(), http.MethodGet, "https://"+p.play.host()+"/", nil)
	if err != nil {
		p.t.Fatal(err)
	}
	made := &reuseRequest{client: client, number: fmt.Sprintf("%s %s %d", p.proxy.address, p.play.name, len(p.made))}
	if how != "" {
		request.Header.Set(how, made.number)
	}
	if made.response, err = p.client(client).Do(request); err != nil {
		p.t.Fatal(err)
	}
	if made.response.StatusCode != http.StatusOK {
		p.t.Fatal(made.response.Status)
	}
	p.made = append(p.made, made)
	peer := make([]byte, 64)
	n, err := made.response.Body.Read(peer)
	if n == 0 {
		p.t.Fatal(err)
	}
	made.peer = string(peer[:n])
	return made
}

// finish reads the rest of an answer.
func (p *performance) finish(request *reuseRequest) {
	p.t.Helper()
	p.release(request)
	if _, err := io.Copy(io.Discard, request.response.Body); err != nil {
		p.t.Error(err)
	}
	_ = request.response.Body.Close()
}

func (p *performance) release(request *reuseRequest) {
	hold := p.hold(request.number)
	select {
	case <-hold:
	default:
		close(hold)
	}
}

// rest waits until only connections whose answers wait are in use: an answer is
// with the client before the proxy has its connection back.
func (p *performance) rest() {
	p.t.Helper()
	inUse := make(map[string]bool)
	for _, requests := range p.waiting {
		for _, request := range requests {
			inUse[request.peer] = true
		}
	}
	var busy int
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		if busy = p.proxy.busy(p.t, p.play); busy < 0 || busy == len(inUse) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	p.t.Fatalf("%d connections are in use, want %d", busy, len(inUse))
}

func (p *performance) end() {
	for _, requests := range p.waiting {
		for _, request := range requests {
			p.release(request)
		}
	}
	for _, client := range p.clients {
		client.CloseIdleConnections()
	}
}

// backend starts what both proxies stand before.
func (r *rehearsal) backend(t *testing.T, h2 bool) *peers.Backend {
	return r.Launch(t, func(_ context.Context, o peers.Options) (*peers.Backend, error) {
		return peers.GoWith(o, r)
	}, peers.Options{HTTP2: h2})
}

// edge starts an edge for the plays of a mode.
func (r *rehearsal) edge(mode string, plays []play) reuseProxy {
	edge := r.StartEdge(mode, "mode="+mode)
	address := r.Address()
	var manifest strings.Builder
	manifest.WriteString(harness.Certificate("site", r.Pair) + harness.Listener(mode, address, "mode: "+mode, ""))
	for _, play := range plays {
		manifest.WriteString(r.Pool(play.name, []*peers.Backend{r.backends[play.backendH2]}, "  connections: {reuse: "+play.mode+"}\n"))
		manifest.WriteString(harness.Route(play.name, mode, play.host(), play.name, ""))
	}
	r.WaitAcked(r.Apply(manifest.String()), edge)
	return reuseProxy{address: address, busy: func(t *testing.T, play play) int {
		t.Helper()
		busy, err := edgeBusy(t.Context(), r.page, edge.Admin, play.name)
		if err != nil {
			t.Fatal(err)
		}
		return busy
	}}
}

// edgeBusy reads one gauge of an edge. Parsing the whole page again and again
// would take most of the test's time.
func edgeBusy(ctx context.Context, client *http.Client, admin, pool string) (int, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, err
	}
	defer func() { _ = response.Body.Close() }()
	page, err := io.ReadAll(response.Body)
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(page), fmt.Sprintf("\nreseal_backend_connections{pool=%q,state=\"active\"} ", pool))
	number, _, _ := strings.Cut(rest, "\n")
	return strconv.Atoi(number)
}

func pick[T any](yes bool, one, other T) T {
	if yes {
		return one
	}
	return other
}
