package bench

import (
	"fmt"

	"github.com/reseal/reseal/integration/peers"
)

// busyProcesses is how many processes compete with everything in the rows under
// load.
const busyProcesses = 8

// stock are the rows with Jetty as people run it, which is where everybody's
// resumption fails: its certificate has two names.
func stock() []*Scenario {
	versions := []struct {
		key, title string
		mode       peers.Mode
		must       int64
	}{
		{"tls12", "TLS 1.2", peers.TLS12Tickets, 3},
		{"tls13", "TLS 1.3", peers.TLS13, 8},
	}
	var all []*Scenario
	add := func(mode peers.Mode, s *Scenario) {
		s.backend, s.mode, s.closeEach, s.AtMost = peers.Jetty, mode, true, true
		all = append(all, s)
	}
	for _, v := range versions {
		add(v.mode, &Scenario{Key: "stock-" + v.key, Title: v.title, Must: v.must, Best: true, Latency: v.mode == peers.TLS13})
	}
	add(peers.TLS13, &Scenario{Key: "stock-cold", Title: "TLS 1.3, 256 cold clients at once", Must: 12, Best: true, clients: coldClients})
	for _, v := range versions {
		const names = 4
		add(v.mode, &Scenario{
			Key: "stock-hosts-" + v.key, Title: v.title + ", 4 host names, SNI follows the host", Must: names * v.must, Best: true,
			names: names, share: 0.4,
		})
	}
	for _, v := range versions {
		add(v.mode, &Scenario{
			Key: "stock-restart-" + v.key, Title: v.title + ", edge stopped by SIGTERM and started halfway: none after it", Must: v.must,
			ResealOnly: true, stops: true, drive: driveRestart,
		})
	}
	for _, v := range versions {
		add(v.mode, &Scenario{
			Key: "stock-fleet-" + v.key, Title: v.title + ", 8 edges one after another, each restarted once, `sharing: fleet`", Must: v.must,
			ResealOnly: true, stops: true, sessions: "sharing: fleet", drive: driveFleet,
		})
	}
	return all
}

// loaded are the same rows while other processes take most of the CPU, with twice
// the bounds.
func loaded() []*Scenario {
	all := stock()
	for _, s := range all {
		s.Key = "loaded-" + s.Key[len("stock-"):]
		s.Title = fmt.Sprintf("%s, beside %d busy processes", s.Title, busyProcesses)
		s.Must *= 2
		s.busy, s.ResealOnly, s.Best, s.Latency = busyProcesses, true, false, false
		s.pool = patientPool
	}
	return all
}
