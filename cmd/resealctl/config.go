package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const configLong = `Show and change contexts. A context is a name for a control plane: its
addresses, its trust domain and roots, and the client certificate to use there.

They are kept in ~/.config/reseal/config.yaml, or reseal/config.yaml below
$XDG_CONFIG_HOME. --config and RESEAL_CONFIG name another file. A control plane
writes such a file on its first start, DATA_DIR/admin.yaml; use it as it is with
--config, or import it with: resealctl config import DATA_DIR/admin.yaml`

func newConfigCommand(a *app) *cobra.Command {
	return newGroupCommand("config", "Show and change contexts", configLong,
		newConfigViewCommand(a), newGetContextsCommand(a), newCurrentContextCommand(a), newUseContextCommand(a),
		newSetContextCommand(a), newDeleteContextCommand(a), newImportCommand(a))
}

func newConfigViewCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "view",
		Short: "Show the file with contexts, without private keys",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			file, _, _, err := a.loadContexts()
			if err != nil {
				return err
			}
			for i := range file.Contexts {
				if key := &file.Contexts[i].PrivateKeyPEM; *key != "" {
					*key = resealv1.SecretMarker
				}
			}
			data, err := encodeContexts(file)
			if err != nil {
				return err
			}
			_, err = a.out.Write(data)
			return err
		},
	}
}

func newGetContextsCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get-contexts",
		Short: "Show the contexts",
		Args:  cobra.NoArgs,
	}
	format := registerFormat(cmd, "table", "name", "json", "yaml")
	cmd.RunE = func(*cobra.Command, []string) error {
		file, path, _, err := a.loadContexts()
		if err != nil {
			return err
		}
		return a.printContexts(format, file, path)
	}
	return cmd
}

// contextView is a context as -o json and yaml show it.
type contextView struct {
	Name         string   `json:"name"`
	Current      bool     `json:"current"`
	ControlPlane []string `json:"controlPlane"`
	TrustDomain  string   `json:"trustDomain"`
	Role         string   `json:"role"`
	User         string   `json:"user"`
	Expires      string   `json:"expires"`
}

func viewContext(c namedContext, current string) contextView {
	view := contextView{Name: c.Name, Current: c.Name == current, ControlPlane: c.ControlPlane, TrustDomain: c.TrustDomain}
	t := &target{name: c.Name, certPEM: []byte(c.CertificatePEM)}
	if who, err := t.identity(); err == nil {
		view.Role, view.User, view.Expires = resealv1.Label(who.role), who.name, expiry(who.expires)
	}
	return view
}

func (a *app) printContexts(f *format, file *contextFile, path string) error {
	views := make([]contextView, len(file.Contexts))
	for i, c := range file.Contexts {
		views[i] = viewContext(c, file.CurrentContext)
	}
	switch {
	case f.structured():
		return a.printDocument(f, map[string]any{"contexts": views})
	case f.value == "name":
		for _, v := range views {
			a.printf("%s\n", v.Name)
		}
		return nil
	case len(views) == 0:
		a.warnf("No contexts in %s.\n", path)
		return nil
	}
	t := newTable(a.out, "CURRENT", "NAME", "CONTROLPLANE", "TRUSTDOMAIN", "ROLE", "USER", "EXPIRES")
	for _, v := range views {
		mark := ""
		if v.Current {
			mark = "*"
		}
		t.add(mark, v.Name, joinSome(v.ControlPlane, 3), v.TrustDomain, orNone(v.Role), orNone(v.User), orNone(v.Expires))
	}
	t.flush()
	return nil
}

func newCurrentContextCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "current-context",
		Short: "Show the name of the context in use",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			file, path, exists, err := a.loadContexts()
			if err != nil {
				return err
			}
			chosen, err := a.chooseContext(file, path, exists)
			if err != nil {
				return err
			}
			if chosen == nil {
				return errors.New("no context: flags and variables say everything")
			}
			a.printf("%s\n", chosen.Name)
			return nil
		},
	}
}

// changeContexts loads the file, changes it and writes it back.
func (a *app) changeContexts(change func(file *contextFile, path string) error) error {
	file, path, _, err := a.loadContexts()
	if err != nil {
		return err
	}
	if err := change(file, path); err != nil {
		return err
	}
	return writeContexts(path, file)
}

func noContext(file *contextFile, path, name string) error {
	return fmt.Errorf("%s has no context %q; it has: %s", path, name, orNone(strings.Join(file.names(), ", ")))
}

func newUseContextCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "use-context NAME",
		Short:             "Choose the context to use from now on",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeContexts,
		RunE: func(_ *cobra.Command, args []string) error {
			return a.changeContexts(func(file *contextFile, path string) error {
				if file.find(args[0]) == nil {
					return noContext(file, path, args[0])
				}
				file.CurrentContext = args[0]
				a.printf("context %q is now the current one\n", args[0])
				return nil
			})
		},
	}
}

func newDeleteContextCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "delete-context NAME",
		Short:             "Remove a context with its certificate and key",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeContexts,
		RunE: func(_ *cobra.Command, args []string) error {
			return a.changeContexts(func(file *contextFile, path string) error {
				if file.find(args[0]) == nil {
					return noContext(file, path, args[0])
				}
				file.Contexts = slices.DeleteFunc(file.Contexts, func(c namedContext) bool { return c.Name == args[0] })
				if file.CurrentContext == args[0] {
					file.CurrentContext = ""
					a.warnf("Warning: it was the current context; choose another one with: resealctl config use-context NAME\n")
				}
				a.printf("context %q deleted\n", args[0])
				return nil
			})
		},
	}
}

func newSetContextCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "set-context NAME",
		Short: "Create or change a context",
		Long: `Create or change a context with --control-plane, --trust-domain, --ca-file,
--certificate-file and --private-key-file. The contents of the files are copied.
What is not given stays as it is.`,
		Example: `  resealctl config set-context prod --control-plane cp1:7443,cp2:7443 \
    --ca-file ca.pem --certificate-file me.pem --private-key-file me.key`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeContexts,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeContexts(func(file *contextFile, _ string) error {
				next := namedContext{Name: args[0], TrustDomain: "reseal"}
				if old := file.find(args[0]); old != nil {
					next = *old
				}
				if err := a.fillContext(cmd, &next); err != nil {
					return err
				}
				if file.CurrentContext == "" {
					file.CurrentContext = next.Name
				}
				a.printf("context %q %s\n", next.Name, file.put(next))
				return nil
			})
		},
	}
}

// fillContext takes what the command line says, not what variables say.
func (a *app) fillContext(cmd *cobra.Command, c *namedContext) error {
	given := func(flag string) bool { return cmd.Root().PersistentFlags().Changed(flag) }
	s := a.settings
	if given("control-plane") {
		for _, address := range s.controlPlane {
			if err := checkAddress(address); err != nil {
				return usagef("%v", err)
			}
		}
		c.ControlPlane = s.controlPlane
	}
	if given("trust-domain") {
		c.TrustDomain = s.trustDomain
	}
	for _, file := range []struct {
		flag, path string
		text       *string
	}{
		{"ca-file", s.caFile, &c.CAPEM},
		{"certificate-file", s.certificateFile, &c.CertificatePEM},
		{"private-key-file", s.privateKeyFile, &c.PrivateKeyPEM},
	} {
		if !given(file.flag) {
			continue
		}
		data, err := os.ReadFile(file.path)
		if err != nil {
			return err
		}
		*file.text = string(data)
	}
	if len(c.ControlPlane) == 0 {
		return usagef("context %q has no control plane: give --control-plane host:port", c.Name)
	}
	return nil
}

func newImportCommand(a *app) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Import the contexts of another file",
		Long: `Import the contexts of another file, for example of the admin.yaml that a
control plane wrote. A context of the same name is replaced. The first imported
context becomes the current one when there is none.`,
		Example: "  resealctl config import /var/lib/reseal/admin.yaml --name prod",
		Args:    cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&name, "name", "", "name for the imported context")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		source, err := a.readContexts(args[0])
		if err != nil {
			return err
		}
		imported, err := source.toImport(args[0], name)
		if err != nil {
			return err
		}
		return a.changeContexts(func(file *contextFile, path string) error {
			for _, c := range imported {
				a.printf("context %q %s in %s\n", c.Name, file.put(c), path)
			}
			if file.CurrentContext == "" {
				file.CurrentContext = imported[0].Name
			}
			return nil
		})
	}
	return cmd
}

// toImport are the contexts to import, at least one. With a name it is one:
// the current, or the only one.
func (f *contextFile) toImport(path, name string) ([]namedContext, error) {
	if len(f.Contexts) == 0 {
		return nil, fmt.Errorf("%s holds no context", path)
	}
	if name == "" {
		return f.Contexts, nil
	}
	current := f.find(f.CurrentContext)
	if current == nil && len(f.Contexts) == 1 {
		current = &f.Contexts[0]
	}
	if current == nil {
		return nil, fmt.Errorf("%s holds several contexts and none is current: leave out --name", path)
	}
	renamed := *current
	renamed.Name = name
	return []namedContext{renamed}, nil
}
