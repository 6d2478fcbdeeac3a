package main

import (
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// versionHeader is the response header in which a control plane says its
// version.
const versionHeader = "reseal-version"

// buildView describes this binary.
type buildView struct {
	Version  string `json:"version"`
	Commit   string `json:"commit"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// serverView describes the control plane and its edges.
type serverView struct {
	Address string            `json:"address"`
	Status  string            `json:"status"`
	Version string            `json:"version"`
	Edges   map[string]string `json:"edges"`
}

type versionView struct {
	Client buildView   `json:"client"`
	Server *serverView `json:"server,omitempty"`
}

func readBuild() buildView {
	view := buildView{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return view
	}
	if view.Version == "" {
		view.Version = info.Main.Version
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			view.Commit = setting.Value
		}
	}
	return view
}

func newVersionCommand(a *app) *cobra.Command {
	var clientOnly bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show versions of this command, the control plane and the edges",
		Args:  cobra.NoArgs,
	}
	cmd.Flags().BoolVar(&clientOnly, "client", false, "only this command's; needs no control plane")
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		view := versionView{Client: readBuild()}
		var err error
		if !clientOnly {
			view.Server, err = a.askVersions(cmd)
		}
		if printErr := a.printVersions(format, view); printErr != nil {
			return printErr
		}
		return err
	}
	return cmd
}

// askVersions asks the control plane for its state and its edges.
func (a *app) askVersions(cmd *cobra.Command) (*serverView, error) {
	client, err := a.connect()
	if err != nil {
		return nil, err
	}
	var header metadata.MD
	health, err := grpc_health_v1.NewHealthClient(client.conn).Check(cmd.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.Header(&header))
	if err != nil {
		return nil, err
	}
	view := &serverView{
		Address: strings.Join(client.target.controlPlane, ","),
		Status:  strings.ToLower(health.GetStatus().String()),
		Version: strings.Join(header.Get(versionHeader), ""),
		Edges:   map[string]string{},
	}
	edges, err := client.fleet.ListEdges(cmd.Context(), &resealv1.ListEdgesRequest{})
	if err != nil {
		return view, err
	}
	for _, edge := range edges.GetEdges() {
		view.Edges[edge.GetId()] = edge.GetVersion()
	}
	return view, nil
}

func (a *app) printVersions(f *format, view versionView) error {
	if f.structured() {
		return a.printDocument(f, view)
	}
	d := describer{w: a.out}
	d.line(0, "Client", strings.TrimSpace(view.Client.Version+" "+view.Client.Commit))
	d.line(0, "Built with", view.Client.Go+" "+view.Client.Platform)
	if server := view.Server; server != nil {
		d.line(0, "Control plane", strings.TrimSpace(server.Version+" "+server.Address+" "+server.Status))
		for _, id := range slices.Sorted(maps.Keys(server.Edges)) {
			d.line(0, "Edge "+id, orNone(server.Edges[id]))
		}
	}
	d.flush()
	return nil
}
