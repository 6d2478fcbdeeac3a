package interop

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// others are the requests of clients who have nothing to do with what a test
// does.
type others struct {
	clients []*http.Client
	urls    []string
	calm    time.Duration // the median of such a request while nothing is going on
}

// watchOthers makes such requests to pools, for a start.
func (s *site) watchOthers(t *testing.T, clients [2]*http.Client, pools ...string) *others {
	t.Helper()
	o := &others{clients: clients[:]}
	for _, pool := range pools {
		o.urls = append(o.urls, "https://"+host(pool)+peers.Small)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	o.calm, _ = o.send(t, ctx)
	return o
}

// during makes requests until do is done. None may fail, and at least the half
// of them must take about the time that they took before.
func (o *others) during(t *testing.T, do func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var sending sync.WaitGroup
	sending.Go(func() {
		median, longest := o.send(t, ctx)
		t.Logf("requests of others took %v, median; before %v; the longest %v", median, o.calm, longest)
		if median > 10*o.calm+50*time.Millisecond {
			t.Errorf("requests of others took %v, median, and %v before", median, o.calm)
		}
	})
	do()
	cancel()
	sending.Wait()
}

// send makes requests until ctx ends.
func (o *others) send(t *testing.T, ctx context.Context) (median, longest time.Duration) {
	var took []time.Duration
	for i := 0; len(took) < 20 || ctx.Err() == nil; i++ {
		started := time.Now()
		if err := harness.Get(t.Context(), o.clients[i%len(o.clients)], o.urls[i/len(o.clients)%len(o.urls)], peers.Body(peers.Small)); err != nil {
			t.Error(err)
			return 0, 0
		}
		took = append(took, time.Since(started))
		time.Sleep(time.Millisecond)
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)-1]
}

// held is what an edge holds.
type held struct{ goroutines, descriptors int }

// held looks at what the edge holds while the clients have no connections.
func (s *site) held(t *testing.T, clients [2]*http.Client) held {
	t.Helper()
	var h held
	for _, client := range clients {
		client.CloseIdleConnections()
	}
	harness.Settle(t, func() error {
		if n := s.edge.Metrics().Sum("reseal_frontend_connections"); n != 0 {
			return fmt.Errorf("%v connections of clients are left", n)
		}
		return nil
	})
	response, err := http.Get("http://" + s.edge.Admin + "/debug/pprof/goroutine?debug=1")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	first, err := bufio.NewReader(response.Body).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(first[strings.LastIndexByte(first, ' ')+1:], "%d", &h.goroutines); err != nil {
		t.Fatalf("%q: %v", first, err)
	}
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.edge.PID()))
	if err != nil {
		t.Fatal(err)
	}
	h.descriptors = len(descriptors)
	return h
}

// lets waits until the edge holds no more than before, give or take what comes and
// goes by itself.
func (s *site) lets(t *testing.T, clients [2]*http.Client, before held) {
	t.Helper()
	const slack = 8
	harness.Settle(t, func() error {
		if now := s.held(t, clients); now.goroutines > before.goroutines+slack || now.descriptors > before.descriptors+slack {
			return fmt.Errorf("the edge held %+v before, and now %+v", before, now)
		}
		return nil
	})
}
