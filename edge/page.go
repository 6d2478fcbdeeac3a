package edge

import (
	"encoding/json"
	"net/http"
	"net/http/pprof"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

func newHandler(e *Edge) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		switch {
		case e.apply.inForce.Load() == nil:
			http.Error(w, "no configuration yet", http.StatusServiceUnavailable)
		case e.frontend.Draining():
			http.Error(w, "draining", http.StatusServiceUnavailable)
		default:
			_, _ = w.Write([]byte("ok\n"))
		}
	})
	mux.HandleFunc("GET /upgrade", func(w http.ResponseWriter, _ *http.Request) { e.describeUpgrade(w) })
	mux.Handle("GET /metrics", promhttp.HandlerFor(e.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// servingRevision is the newest revision that was in force as a whole, 0 for none.
func (e *Edge) servingRevision() int64 {
	if now := e.apply.inForce.Load(); now != nil {
		return now.revision
	}
	return 0
}

func registerFeedMetrics(registry *prometheus.Registry, e *Edge) {
	registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "reseal_feed_connected",
			Help: "Whether the edge hears from the control plane (1) or not (0).",
		}, func() float64 {
			select {
			case <-e.enrolled:
			default:
				return 0
			}
			if e.feed.Connected() {
				return 1
			}
			return 0
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "reseal_config_revision",
			Help: "The newest revision that the edge served as a whole, 0 for none.",
		}, func() float64 { return float64(e.servingRevision()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "reseal_observations",
			Help: "How many see what becomes of requests now (resealctl observe).",
		}, func() float64 { return float64(e.observers.Count()) }),
	)
}

func registerLogMetrics(registry *prometheus.Registry, dropped func() uint64) {
	if dropped == nil {
		return
	}
	registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "reseal_access_log_dropped_total",
		Help: "Records of the access log that were lost because its file could not be written.",
	}, func() float64 { return float64(dropped()) }))
}

func registerMemoryMetrics(registry *prometheus.Registry, limit int64) {
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "reseal_memory_limit_bytes",
		Help: "What the edge may use of memory before it refuses new connections and requests; 0: no limit.",
	}, func() float64 { return float64(limit) }))
}

// upgradeState is what /upgrade answers.
type upgradeState struct {
	PID         int                  `json:"pid"`
	Version     string               `json:"version"`
	BootID      string               `json:"bootId"`
	Predecessor *drainingPredecessor `json:"predecessor,omitempty"`
}

// drainingPredecessor is the process before, while it drains.
type drainingPredecessor struct {
	PID         int    `json:"pid"`
	Version     string `json:"version"`
	Connections int    `json:"connections"`
}

func (e *Edge) describeUpgrade(w http.ResponseWriter) {
	now := upgradeState{PID: os.Getpid(), Version: e.cfg.Version, BootID: e.bootID}
	if left := e.handover.left.Load(); left != nil {
		terms := e.cfg.Predecessor.Terms
		now.Predecessor = &drainingPredecessor{terms.PID, terms.Version, left.Connections}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(now) // the client may be gone
}

func registerUpgradeMetrics(registry *prometheus.Registry, e *Edge) {
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "reseal_upgrade_draining_connections",
		Help: "Connections of clients that the process before an upgrade still has.",
	}, func() float64 {
		if left := e.handover.left.Load(); left != nil {
			return float64(left.Connections)
		}
		return 0
	}))
}
