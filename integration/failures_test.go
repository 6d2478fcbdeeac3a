package integration

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/harness"
)

// failureList is what the test reads of get failures -o json.
type failureList struct {
	Failures []struct {
		Edge, RequestID, Listener, Pool, Endpoint, Reason, Blame, Method, Host, Path string

		Status, Attempts int
	}
	SilentEdges []string
	Unanswered  []struct{ Replica string }
}

// TestFailures: the last requests that any edge could not serve well are told by
// every replica, without queries, and a replica that does not answer is named.
func TestFailures(t *testing.T) {
	r := newReplicated(t, 2)
	edge := r.StartEdge("edge-a", "")
	dead := r.Address()
	address := r.Address()
	r.WaitAcked(r.Apply(harness.Certificate("site", r.Pair)+fmt.Sprintf(`---
apiVersion: reseal/v1
kind: BackendPool
metadata: {name: dead}
spec: {endpoints: [{address: %q}], tls: {serverName: dead.test, trust: {system: true}}}
`, dead)+harness.Listener("web", address, "", "  pool: dead\n")), edge)
	client := r.Client(t, address, false)
	request, err := http.NewRequest(http.MethodGet, "https://"+harness.SiteName+"/path?secret=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("X-Request-Id", "r-1")
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	if response.StatusCode != http.StatusBadGateway {
		t.Fatalf("status %d", response.StatusCode)
	}
	for _, replica := range r.replicas {
		var list failureList
		text := r.jsonAt(replica, &list, "get", "failures", "--pool", "dead").Stdout
		if len(list.Failures) != 1 || strings.Contains(text, "secret") {
			t.Fatalf("at %s: %s", replica.Address, text)
		}
		if f := list.Failures[0]; f.Edge != "edge-a" || f.RequestID != "r-1" || f.Listener != "web" || f.Endpoint != dead || f.Status != 502 ||
			f.Reason != "connect_failure" || f.Blame != "backend" || f.Method != "GET" || f.Host != harness.SiteName || f.Path != "/path" || f.Attempts < 1 {
			t.Errorf("at %s: %s", replica.Address, text)
		}
		r.jsonAt(replica, &list, "get", "failures", "--pool", "other")
		if len(list.Failures) != 0 {
			t.Errorf("of another pool: %+v", list)
		}
	}
}
