package framing

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/rivals"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// lanes are how many cases are tried at the same time.
const lanes = 8

// newLanes starts Reseal, HAProxy and nginx with so many listeners each.
func newLanes(t *testing.T) []*lane {
	t.Helper()
	programs := rivals.Programs()
	harness.Need(t, "haproxy")
	harness.Need(t, "nginx")
	site := harness.NewSite(harness.NewShipped(t))
	all := make([]*lane, lanes)
	var sites [proxies][]rivals.Site
	manifest := harness.Certificate("site", site.Pair)
	for i := range all {
		l := &lane{tls: site.ClientTLS()}
		for p := range l.fronts {
			recorder, err := newRecorder(site.Authority)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(recorder.close)
			l.recorders[p], l.fronts[p] = recorder, site.Address()
			sites[p] = append(sites[p], rivals.Site{Address: l.fronts[p], Backend: recorder.address()})
		}
		name := fmt.Sprintf("lane-%d", i)
		manifest += site.Pool(name, []*peers.Backend{{Address: l.recorders[reseal].address()}}, "  protocol: http1\n") +
			harness.Listener(name, l.fronts[reseal], "", "  pool: "+name+"\n")
		all[i] = l
	}
	site.StartControlPlane()
	edge := site.StartEdge("one", "")
	site.WaitAcked(site.Apply(manifest), edge)
	edge.WaitReady()
	for i, p := range []int{haproxy, nginx} {
		running, err := programs[i].Start(t.Context(), rivals.Config{
			Dir: t.TempDir(), Authority: site.Authority, Names: []string{harness.SiteName}, Threads: 1, Sites: sites[p],
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := running.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
	return all
}

// judge tries an input, and again with more patience when something seems wrong.
func (l *lane) judge(t *testing.T, in input) (seen [proxies]sighting, ok bool) {
	for _, quiet := range []time.Duration{quick, patient, patient} {
		var err error
		if seen, err = l.try(in, quiet); err != nil {
			t.Errorf("%s: %v", in.name, err)
			return seen, false
		}
		var read sighting
		if !in.http2 {
			read = reference(l.text(in))
		}
		found := problems(seen, read)
		if len(found) == 0 {
			found, err = l.behind(seen[reseal].raw)
		}
		if err == nil && len(found) == 0 {
			return seen, true
		}
		if quiet == patient {
			t.Errorf("%s (%v)\n%s", strings.Join(found, "\n"), err, describe(in, seen))
			return seen, false
		}
	}
	return seen, false
}

// TestFraming tries the fixed matrix.
func TestFraming(t *testing.T) {
	all := newLanes(t)
	inputs := seeds()
	var next, through, same atomic.Int64
	var running sync.WaitGroup
	for _, l := range all {
		running.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(inputs)); i = next.Add(1) - 1 {
				seen, ok := l.judge(t, inputs[i])
				if !ok {
					continue
				}
				if len(seen[reseal].messages) > 0 {
					through.Add(1)
				}
				if len(seen[reseal].messages) == len(seen[haproxy].messages) && len(seen[reseal].messages) == len(seen[nginx].messages) {
					same.Add(1)
				}
			}
		})
	}
	running.Wait()
	t.Logf("%d inputs: Reseal passed on something of %d, all three as many requests of %d", len(inputs), through.Load(), same.Load())
	// A matrix of which nothing gets through proves nothing.
	if through.Load() < int64(len(inputs)/20) {
		t.Errorf("Reseal passed on something of %d of %d inputs only", through.Load(), len(inputs))
	}
}

// TestFuzzPeers tries random changes of the matrix for as long as RESEAL_FUZZ_PEERS
// says.
func TestFuzzPeers(t *testing.T) {
	text := os.Getenv("RESEAL_FUZZ_PEERS")
	if text == "" {
		t.Skip("it finds something new each time, or nothing: run it by make fuzz-peers")
	}
	length, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	inputs := seeds()
	var tried atomic.Int64
	var running sync.WaitGroup
	end := time.Now().Add(length)
	for i, l := range newLanes(t) {
		running.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(i)))
			for time.Now().Before(end) && !t.Failed() {
				l.judge(t, mutate(random, inputs))
				tried.Add(1)
			}
		})
	}
	running.Wait()
	t.Logf("%d inputs", tried.Load())
}

// pieces are what mutations put into inputs.
var pieces = []string{
	"\r\n", "\n", "\r", "\x00", " ", "\t", "\v", ":", ",", ";", "0", "5", "f", "-", "+", "_", "\r\n ", "\r\n\r\n", "0\r\n\r\n", "\x7f", "\xff", "\"",
	"Transfer-Encoding: chunked\r\n", "Content-Length: 5\r\n", "Content-Length: 0\r\n", "Connection: close\r\n", "Expect: 100-continue\r\n", "Host: a\r\n", "chunked", "identity", "HTTP/1.0", "HTTP/1.1",
	next, "GET ", "HEAD ", "POST ", "/ID", "?", "#", "%00", "%0d%0a", "http://", "5\r\nhello\r\n",
}

// mutate changes a seed, or two that are joined, in a few places.
func mutate(random *rand.Rand, inputs []input) input {
	in := inputs[random.IntN(len(inputs))]
	head := 0
	if in.http2 {
		head = len(http2.ClientPreface)
	} else if random.IntN(3) == 0 {
		if other := inputs[random.IntN(len(inputs))]; !other.http2 {
			in.bytes += other.bytes
		}
	}
	text := []byte(in.bytes)
	for range 1 + random.IntN(4) {
		at := head + random.IntN(len(text)-head+1)
		until := min(at+random.IntN(8), len(text))
		piece := []byte(pieces[random.IntN(len(pieces))])
		switch random.IntN(5) {
		case 0: // put in
			until = at
		case 1: // replace
		case 2: // take away
			piece = nil
		case 3: // double
			piece = append([]byte(nil), text[at:until]...)
			until = at
		case 4: // another byte
			if at == len(text) {
				continue
			}
			piece, until = []byte{text[at] ^ 1<<random.IntN(8)}, at+1
		}
		text = append(append(append([]byte(nil), text[:at]...), piece...), text[until:]...)
	}
	return input{name: "mutation of " + in.name, http2: in.http2, bytes: string(text)}
}
